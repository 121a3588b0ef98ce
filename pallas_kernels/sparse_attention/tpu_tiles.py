"""Holds what the TPU kernels of selected attention share: sizes, entries of unions, tiles."""

# B batch, T query positions, S key positions, H width of queries and keys, U width of values,
# A = B * K rows and key heads, G heads of a group, Q queries and R = Q * G rows of a query block,
# X query blocks, Z rows of a group of them, W words of a query block's bits, L keys that are read
# of a block, Y keys of a tile
from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention import unions

LANES = 128
ALIGN = 16  # rows of bfloat16 in a register: where a block of a packed row may be read from
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
  """Holds the sizes of the kernels; hashable."""

  S: int
  G: int
  Q: int
  abreast: int  # query blocks of a group, which a kernel works on beside each other
  groups: int  # of a grid step
  stacked: int  # blocks of keys of a tile
  block: int
  packed: bool  # blocks start anywhere
  scale: float
  together: bool  # the backward pass holds the gradients of one head's keys and values in VMEM
  interpret: Any

  @property
  def rows(self) -> int:
    """Returns R, the rows of a query block."""
    return self.Q * self.G

  @property
  def step_blocks(self) -> int:
    """Returns the query blocks of a grid step."""
    return self.abreast * self.groups

  @property
  def group_rows(self) -> int:
    """Returns Z, the rows of a group."""
    return self.abreast * self.rows

  @property
  def words(self) -> int:
    """Returns W, the words of a query block's bits."""
    return -(-self.Q // 32)

  @property
  def read(self) -> int:
    """Returns L: an unaligned block is read with what stands around it."""
    return self.block + ALIGN * self.packed


class Member(NamedTuple):
  """Describes a query block of a group, the one that a grid step's order names."""

  number: Any  # in the grid step
  rows: Any  # where its rows are in the step's
  columns: slice  # where they are along the lanes of the group's


class Entry(NamedTuple):
  """Describes one entry of a union, as scalars of a kernel."""

  start: Any
  words: tuple[Any, ...]


def members_of(lists: Any, group: Any, plan: Plan) -> list[Member]:
  """Returns the query blocks of a group, by the order in `Unions.rows()`."""
  members = []
  for i in range(plan.abreast):
    number = lists[group * plan.abreast + i, 0, 2]
    rows = pl.ds(pl.multiple_of(number * plan.rows, plan.rows), plan.rows)
    members.append(Member(number, rows, slice(i * plan.rows, (i + 1) * plan.rows)))
  return members


def entries_of(lists: Any, number: Any, tile: Any, plan: Plan) -> list[Entry]:
  """Reads a tile's entries of a query block's `Unions.rows()`."""
  size = (lists.shape[2] - unions.HEAD) // (1 + plan.words)
  entries = []
  for i in range(plan.stacked):
    index = tile * plan.stacked + i
    at_words = unions.HEAD + size + index * plan.words
    words = (lists[number, 0, at_words + w] for w in range(plan.words))
    entries.append(Entry(lists[number, 0, unions.HEAD + index], tuple(words)))
  return entries


def selected_rows(words: tuple[Any, ...], plan: Plan) -> jax.Array:
  """Returns bool [1, R]: whether a row's query selected the entry with these words of bits."""
  query_1R = jax.lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1) // plan.G
  hit_1R = jnp.zeros_like(query_1R)
  for w, word in enumerate(words):
    bit_1R = jnp.right_shift(jnp.full_like(query_1R, word), query_1R % 32) & 1
    hit_1R = bit_1R if len(words) == 1 else jnp.where(query_1R // 32 == w, bit_1R, hit_1R)
  return hit_1R != 0


def read_tile(ref: Any, entries: list[Entry], plan: Plan) -> jax.Array:
  """Returns the rows of some entries in VMEM, L of each, stacked to [Y, H or U]."""
  blocks = [ref[0, pl.ds(read_from(entry.start, plan), plan.read), :] for entry in entries]
  return jnp.concatenate(blocks, axis=0)


def read_from(start: Any, plan: Plan) -> Any:
  """Returns the first row that `read_tile` reads of a block."""
  if plan.packed:
    return pl.multiple_of(start // ALIGN * ALIGN, ALIGN)
  return pl.multiple_of(start, plan.block)


def seen_tokens(start: Any, positions_1R: jax.Array, plan: Plan) -> jax.Array:
  """Returns bool [L, R]: whether a row's query sees the tokens that `read_tile` reads."""
  shape = (plan.read, positions_1R.shape[1])
  token_LR = read_from(start, plan) + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  seen_LR = token_LR <= positions_1R
  if plan.packed:
    seen_LR = seen_LR & (token_LR >= start) & (token_LR < start + plan.block)
  return seen_LR


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
  """Contracts one axis of each, with float32 sums and all digits of float32 inputs."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def over_groups(lists: Any, plan: Plan, multiply: Any, body: Any) -> None:
  """Runs `body(members)` over the groups of a step, each after `multiply(member, 0)`.

  The next group is multiplied beside the end of this one.
  """

  def begin(group: Any) -> None:
    for member in members_of(lists, group, plan):
      multiply(member, 0)

  def step(group: Any, _: Any) -> int:
    body(members_of(lists, group, plan))
    begin(jnp.minimum(group + 1, plan.groups - 1))
    return 0

  begin(0)
  jax.lax.fori_loop(0, plan.groups, step, 0)


def over_tiles(lists: Any, members: list[Member], plan: Plan, body: Any, carry: Any) -> Any:
  """Runs `body(tile, carry, masked)` over the tiles of the longest union, masked ones last."""
  numbers = [member.number for member in members]
  tiles = functools.reduce(jnp.maximum, [pl.cdiv(lists[n, 0, 0], plan.stacked) for n in numbers])
  plain = functools.reduce(jnp.minimum, [lists[n, 0, 1] // plan.stacked for n in numbers])
  plain = jnp.int32(0) if plan.packed else plain
  carry = jax.lax.fori_loop(0, plain, functools.partial(body, masked=False), carry)
  return jax.lax.fori_loop(plain, tiles, functools.partial(body, masked=True), carry)


def in_specs(X: int, lists: jax.Array, widths: tuple[int, ...], k, v, plan: Plan) -> list[Any]:
  """Returns the blocks of lists, of queries with these widths, of all keys and all values."""
  of_lists = (plan.step_blocks, 1, lists.shape[2])
  return [
    pl.BlockSpec(of_lists, lambda a, x: (a * X + x, 0, 0), memory_space=pltpu.SMEM),
    *(rows_spec(width, plan) for width in widths),
    whole_spec(k),
    whole_spec(v),
  ]


def rows_spec(width: int, plan: Plan) -> pl.BlockSpec:
  """Returns the block of a grid step's rows, of [A, X * rows, width]."""
  return pl.BlockSpec((1, plan.groups * plan.group_rows, width), lambda a, x: (a, x, 0))


def lanes_spec(plan: Plan) -> pl.BlockSpec:
  """Returns the block of a number for each of a grid step's rows, of [A, X, 1, R]."""
  return pl.BlockSpec((1, plan.step_blocks, 1, plan.rows), lambda a, x: (a, x, 0, 0))


def whole_spec(x_ASH: jax.Array) -> pl.BlockSpec:
  """Returns the block of everything of one row and head, which is in VMEM once."""
  return pl.BlockSpec((1, *x_ASH.shape[1:]), lambda a, x: (a, 0, 0), pipeline_mode=pl.Buffered(1))


def compiler_params(
  plan: Plan, steps: Literal["parallel", "arbitrary"] = "parallel"
) -> pltpu.CompilerParams:
  """Returns the kernels' parameters; `steps` of one row and head may be "arbitrary", in order."""
  vmem = 64 * 2**20 if plan.interpret else pltpu.get_tpu_info().vmem_capacity_bytes
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", steps), vmem_limit_bytes=int(0.95 * vmem)
  )
