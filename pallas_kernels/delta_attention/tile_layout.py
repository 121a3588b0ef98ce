"""Lays arrays out for the TPU kernels, and reads and writes the tiles of one head.

Heads lie side by side along the lanes, as a projection writes them; widths are padded to whole
lanes and positions to whole chunks; gates of one number for a head are in groups of a step's heads.
"""

# B batch, T positions, N heads, K width of keys, V width of values, C positions of a chunk,
# J chunks, A heads of a step; X is K, V or 1
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.delta_attention.terms import (
  WIPE,
  Gated,
  GateParameters,
  Options,
  Tokens,
  apply_gates,
  log_decay,
)
from pallas_kernels.delta_attention.tile_products import Tables, make_tables

CHUNK = 64
LANES = 128


class Parts(NamedTuple):
  """Holds what the kernels read and differentiate: blocks of a step, or tiles of a head."""

  q: Any  # [C, K]
  k: Any
  v: Any  # [C, V]
  decay: Any | None  # [C, K or 1]
  erase: Any | None  # [C, K or 1]
  write: Any | None  # [C, V or 1]
  rate: Any | None  # [1, K], exp(a_log) of the decay's gate
  bias: Any | None  # [1, K]


class Constants(NamedTuple):
  """Holds what kernels read besides."""

  reset: Any | None  # [C, 1] float32, 1 where a segment starts
  tables: Tables


@dataclasses.dataclass(frozen=True)
class Plan:
  """Says how a call is cut into blocks; sizes are padded to whole lanes and chunks."""

  B: int
  T: int
  N: int
  K: int
  V: int
  C: int
  A: int
  length: int  # positions without padding

  @property
  def J(self) -> int:
    """Returns the number of chunks."""
    return self.T // self.C


def make_plan(tokens: Tokens, most: int) -> Plan:
  """Returns the plan of a call with at most so many heads of 128 in a step, or 8 wider ones."""
  B, T, N, V = tokens.v.shape
  C = max(16, min(CHUNK, 1 << (T - 1).bit_length()))
  K, V = round_up(tokens.q.shape[-1], LANES), round_up(V, LANES)
  if max(K, V) > LANES:
    most = min(most, 8)
  A = next(heads for heads in range(most, 0, -1) if N % heads == 0)
  return Plan(B, round_up(T, C), N, K, V, C, A, T)


def arrange(tokens: Tokens, gate: GateParameters, plan: Plan) -> tuple[Parts, Constants]:
  """Returns the kernels' arrays: heads along the lanes, padded; gates of heads in groups of A."""
  group = plan.N // tokens.q.shape[2]
  q, k = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (tokens.q, tokens.k))

  def parameter(x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    x_NK = pad_axis(jnp.broadcast_to(x, (plan.N, tokens.q.shape[3])), plan.K, 1)
    return x_NK.astype(jnp.float32).reshape(1, -1)

  rate = None if gate.a_log_N is None else jnp.exp(gate.a_log_N.astype(jnp.float32))[:, None]
  parts = Parts(
    q=flatten(q, plan.K, plan),
    k=flatten(k, plan.K, plan),
    v=flatten(tokens.v, plan.V, plan),
    decay=flatten(tokens.decay, plan.K, plan),
    erase=flatten(tokens.erase, plan.K, plan),
    write=flatten(tokens.write, plan.V, plan),
    rate=parameter(rate),
    bias=parameter(gate.bias_NX),
  )
  reset = None
  if tokens.reset is not None:
    reset = pad_axis(tokens.reset.astype(jnp.float32)[..., None], plan.T, 1)
  dtype = jnp.float32 if tokens.q.dtype == jnp.float32 else jnp.bfloat16
  return parts, Constants(reset, make_tables(plan.C, dtype))


def flatten(x: jax.Array | None, width: int, plan: Plan) -> jax.Array | None:
  """Returns [B, T, N * width], or [B, N / A, T, A] of one number for a head."""
  if x is None:
    return None
  x = pad_axis(x, plan.T, 1)
  if x.shape[3] == 1:
    x = x.reshape(plan.B, plan.T, plan.N // plan.A, plan.A).swapaxes(1, 2)
    return x.astype(jnp.float32)
  return pad_axis(x, width, 3).reshape(plan.B, plan.T, plan.N * width)


def unflatten(x: jax.Array, like: jax.Array, plan: Plan) -> jax.Array:
  """Returns the array [B, T, heads, X] that `flatten` has padded, in its dtype and shape."""
  if x.ndim == 4:
    x = x.swapaxes(1, 2).reshape(plan.B, plan.T, plan.N, 1)
  else:
    x = x.reshape(plan.B, plan.T, plan.N, -1)
  B, T, heads, X = like.shape
  x = x[:, :T, :, :X]
  if heads < plan.N:
    x = jnp.sum(x.astype(jnp.float32).reshape(B, T, heads, -1, X), axis=3)
  return x.astype(like.dtype)


def part_blocks(parts: Parts, plan: Plan, chunk: Callable[[Any], Any]) -> Parts:
  """Returns the block of each array for the step's heads; `chunk` tells it from the grid's."""

  def block(x: jax.Array | None) -> pl.BlockSpec | None:
    if x is None:
      return None
    if x.ndim == 4:
      return pl.BlockSpec((1, 1, plan.C, plan.A), lambda b, n, j: (b, n, chunk(j), 0))
    width = x.shape[-1] // plan.N * plan.A
    if x.ndim == 2:
      return pl.BlockSpec((1, width), lambda b, n, j: (0, n))
    return pl.BlockSpec((1, plan.C, width), lambda b, n, j: (b, chunk(j), n))

  return Parts(*(block(x) for x in parts))


def constant_blocks(constants: Constants, plan: Plan, chunk: Callable[[Any], Any]) -> Constants:
  """Returns the blocks of the constants."""

  def whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda b, n, j: (0,) * x.ndim)

  reset = pl.BlockSpec((1, plan.C, 1), lambda b, n, j: (b, chunk(j), 0))
  tables = jax.tree.map(whole, constants.tables)
  return Constants(None if constants.reset is None else reset, tables)


def read_constants(constants: Constants, chunk: Any, plan: Plan):
  """Returns tables, the log decay that clears where segments start, and which positions exist."""
  level_CC, level_8C, sums = constants.tables
  tables = Tables(level_CC[...], level_8C[...], sums)
  wipe_C1 = None if constants.reset is None else WIPE * constants.reset[0]
  exists_C1 = None
  if plan.length % plan.C:
    at_C1 = jax.lax.broadcasted_iota(jnp.int32, (plan.C, 1), 0)
    exists_C1 = chunk * plan.C + at_C1 < plan.length
  return tables, wipe_C1, exists_C1


def read_head(parts: Parts, head: int, plan: Plan) -> Parts:
  """Returns the tiles of one head of a step, float32."""

  def read(ref: Any) -> Any:
    return None if ref is None else ref[_index(ref, head, plan)].astype(jnp.float32)

  return Parts(*(read(ref) for ref in parts))


def write_head(dparts: Parts, dtile: Parts, head: int, plan: Plan) -> None:
  """Writes the gradients of one head's tiles; adds those of the gate's parameters."""
  for ref, value in zip(dparts[:6], dtile[:6]):
    if ref is not None:
      ref[_index(ref, head, plan)] = value.astype(ref.dtype)
  for ref, value in zip(dparts[6:], dtile[6:]):
    if ref is not None:
      at = (0, slice(None), slice(head * plan.K, (head + 1) * plan.K))
      ref[at] = ref[at] + value


def _index(ref: Any, head: int, plan: Plan) -> tuple[Any, ...]:
  """Returns where a head's tile is in a block of a step."""
  if len(ref.shape) == 4:
    return 0, 0, slice(None), slice(head, head + 1)
  width = ref.shape[-1] // plan.A
  lanes = slice(head * width, (head + 1) * width)
  return (slice(None), lanes) if len(ref.shape) == 2 else (0, slice(None), lanes)


def gate_tile(tile: Parts, wipe_C1: Any, exists_C1: Any, options: Options) -> Gated:
  """Returns one head's tokens after norm and gates, and resets and padding in their decay."""
  tokens = Tokens(tile.q, tile.k, tile.v, None, tile.erase, tile.write, None)
  gated = apply_gates(tokens, GateParameters(None, None), options)
  if tile.decay is None and wipe_C1 is None:
    return gated
  decay_CK = jnp.zeros_like(gated.k)
  if tile.decay is not None:
    x_CK = jnp.broadcast_to(tile.decay, gated.k.shape)
    decay_CK = log_decay(x_CK, tile.rate, tile.bias, options)
  if exists_C1 is not None:
    decay_CK = jnp.where(exists_C1, decay_CK, 0.0)
  return gated._replace(decay=decay_CK if wipe_C1 is None else decay_CK + wipe_C1)


def pad_state(state_BNKV: jax.Array, plan: Plan) -> jax.Array:
  """Returns the state transposed, [B, N, V, K], padded to whole lanes."""
  state_BNVK = state_BNKV.astype(jnp.float32).swapaxes(2, 3)
  return pad_axis(pad_axis(state_BNVK, plan.V, 2), plan.K, 3)


def state_like(state_BNVK: jax.Array, like: jax.Array) -> jax.Array:
  """Returns the state without padding, [B, N, K, V]."""
  K, V = like.shape[2:]
  return state_BNVK[:, :, :V, :K].swapaxes(2, 3)
