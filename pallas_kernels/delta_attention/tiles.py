"""Computes one chunk of one head from tiles in a TPU's vector memory; differentiable there.

What `chunk.py` does, in the form that a matrix unit likes: only two-dimensional arrays, blocks of
positions told apart by masks, the state transposed so that a decay scales its lanes.
"""

# C positions of a chunk, K width of keys, V width of values, L halvings of the chunk
from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_attention.chunk import halvings
from pallas_kernels.delta_attention.terms import Gated


class Tables(NamedTuple):
  """Holds constants of a chunk; kernels read them, since they may not capture arrays."""

  sums: Any  # [L + 2, C, 2 C or C] of 0 and 1: sums of log decays, see `chunk.halvings`
  sums_transposed: Any  # [L + 2, C, C]
  level_CC: Any  # int32: which halving parts i > j; L on the diagonal, -1 above it
  level_8C: Any  # int32: the same inside of each of C / 8 blocks of 8 positions, side by side

  @property
  def dtype(self) -> Any:
    """Returns the dtype of operands of products."""
    return self.sums[0].dtype


def make_tables(C: int, dtype: Any) -> Tables:
  """Returns the constants for chunks of C positions.

  For bfloat16 the sums are of two parts of each log decay, stacked.
  """
  sums, masks = halvings(C)
  level_CC = np.full((C, C), -1, np.int32)
  for level, mask_CC in enumerate(masks):
    level_CC[mask_CC] = level
  np.fill_diagonal(level_CC, len(masks))
  level_8C = np.concatenate([level_CC[i : i + 8, i : i + 8] for i in range(0, C, 8)], axis=1)
  doubled = sums if dtype == jnp.float32 else np.concatenate([sums, sums], axis=2)
  return Tables(
    jnp.asarray(doubled, dtype),
    jnp.asarray(sums.swapaxes(1, 2), dtype),
    jnp.asarray(level_CC),
    jnp.asarray(level_8C),
  )


class Head(NamedTuple):
  """Holds what a chunk of one head starts from."""

  gated: Gated  # float32 [C, K] and [C, V]
  state_VK: jax.Array


def attend_to_chunks(
  heads: list[Head], tables: Tables, together: int
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns the outputs [C, V] of a chunk of several heads and the states after it, transposed.

  Operands of products have the tables' dtype; all else is float32. The operations of groups of
  `together` heads alternate, since a compiler hides the latency of one product behind its
  neighbours in the program.
  """
  groups = [heads[i : i + together] for i in range(0, len(heads), together)]
  of_groups = _alternate([_steps(group, tables) for group in groups])
  results = [result for of_group in of_groups for result in of_group]
  return [o_CV for o_CV, _ in results], [state_VK for _, state_VK in results]


def _alternate(steps: list[Generator[None, None, Any]]) -> list[Any]:
  """Runs generators in turn, up to the next `yield` of each; returns what they return."""
  results: list[Any] = [None] * len(steps)
  running = dict(enumerate(steps))
  while running:
    for i, step in list(running.items()):
      try:
        next(step)
      except StopIteration as stop:
        results[i] = stop.value
        del running[i]
  return results


def _steps(
  heads: list[Head], tables: Tables
) -> Generator[None, None, list[tuple[jax.Array, jax.Array]]]:
  """Returns each head's output and state; yields where other heads may go on."""
  C, dtype = heads[0].gated.q.shape[0], tables.dtype
  levels = len(tables.sums) - 2
  decays = [head.gated.decay for head in heads]
  pairs = [_Pairs(head.gated, tables.level_CC) for head in heads]
  sums = _sum_decays(decays, tables, 0)
  yield
  for level in range(levels):
    factors = [_exp(x) for x in sums]
    sums = _sum_decays(decays, tables, level + 1)  # a stage ahead of what needs them
    for pair, factor_CK in zip(pairs, factors):
      pair.multiply(level, factor_CK, dtype)
    yield
  from_start = [_exp(x) for x in sums]
  to_end = _sum_decays(decays, tables, levels + 1)
  reads, results = [], []
  for (gated, state_VK), factor_CK in zip(heads, from_start):
    rows = [gated.q] if gated.erased_k is None else [gated.q, gated.erased_k]
    rows_RK = jnp.concatenate([_scaled(x_CK, factor_CK) for x_CK in rows])
    reads.append(split_rows(dot(rows_RK, state_VK, 1, 1, dtype), C))
  added = [head.gated.v for head in heads]
  if heads[0].gated.erased_k is not None:
    lowers = [pair.lower for pair in pairs]
    inverses = yield from _invert_unit_lower(lowers, tables)
    added = [
      solve_unit_lower(jnp.concatenate(lower), v_CV - read[1], inverse_CC, tables.level_CC, dtype)
      for lower, v_CV, read, inverse_CC in zip(lowers, added, reads, inverses)
    ]
    yield
  for i, (gated, state_VK) in enumerate(heads):
    o_CV = reads[i][0] + dot(jnp.concatenate(pairs[i].visible), added[i], 1, 0, dtype)
    if gated.decay is not None:
      state_VK = jnp.exp(jnp.sum(gated.decay, axis=0, keepdims=True)) * state_VK
    k_CK = _scaled(gated.k, _exp(to_end[i]))
    results.append((o_CV, state_VK + dot(added[i], k_CK, 0, 0, dtype)))
  return results


class _Pairs:
  """Collects products of pairs of positions, by groups of 8 rows, over the halvings.

  visible: q_i . (decay_ij k_j) for j <= i; lower: (b k)_i . (decay_ij k_j) for j < i.
  """

  def __init__(self, gated: Gated, level_CC: jax.Array):
    C, levels = gated.q.shape[0], gated.q.shape[0].bit_length() - 1
    self.k_CK, self.q = gated.k, split_rows(gated.q, 8)
    self.erased = [] if gated.erased_k is None else split_rows(gated.erased_k, 8)
    self.level = [level_CC[i : i + 8] for i in range(0, C, 8)]
    diagonal_C1 = jnp.sum(gated.q * gated.k, axis=1, keepdims=True)
    self.visible = [
      jnp.where(level_8C == levels, x_81, 0.0)
      for level_8C, x_81 in zip(self.level, split_rows(diagonal_C1, 8))
    ]
    self.lower = [jnp.zeros_like(x_8C) for x_8C in self.visible] if self.erased else []

  def multiply(self, level: int, factor_CK: jax.Array | None, dtype: Any) -> None:
    """Multiplies the pairs that a halving parts; `factor_CK` decays from or to the middle."""
    rows = _rows_behind(level, len(self.q))
    factors = [None] * len(self.q) if factor_CK is None else split_rows(factor_CK, 8)
    operands = [_scaled(x[i], factors[i]) for x in (self.q, self.erased) if x for i in rows]
    k_CK = _scaled(self.k_CK, factor_CK)
    products = split_rows(dot(jnp.concatenate(operands), k_CK, 1, 1, dtype), 8)
    for x, parts in ((self.visible, products), (self.lower, products[len(rows) :])):
      for i, product_8C in zip(rows, parts if x else []):
        x[i] = jnp.where(self.level[i] == level, product_8C, x[i])


def _rows_behind(level: int, groups: int) -> list[int]:
  """Returns the groups of 8 rows that have a row behind the middle of a block of 2^(level + 1)."""
  return [i for i in range(groups) if level < 3 or i >> (level - 3) & 1]


def _scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
  return x if factor is None else x * factor


def _exp(x: jax.Array | None) -> jax.Array | None:
  return None if x is None else jnp.exp(x)


def _sum_decays(decays: list[Any], tables: Tables, i: int) -> list[Any]:
  """Returns the i-th sums of the heads' log decays."""
  if decays[0] is None:
    return decays
  return _sum_lanes(tables.sums[i], tables.sums_transposed[i], decays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_rows(x: jax.Array, size: int) -> list[jax.Array]:
  """Returns the array in parts of `size` rows; their gradients are joined, not padded and added."""
  return [x[i : i + size] for i in range(0, x.shape[0], size)]


split_rows.defvjp(
  lambda x, size: (split_rows(x, size), None),
  lambda size, residuals, parts: (jnp.concatenate(parts),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
  """Contracts one axis of each; operands `dtype`, also in the backward pass, sums float32."""
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(
    a.astype(dtype), b.astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32
  )


def _dot_forward(a, b, contract_a: int, contract_b: int, dtype: Any):
  return dot(a, b, contract_a, contract_b, dtype), (a.astype(dtype), b.astype(dtype))


def _dot_backward(contract_a: int, contract_b: int, dtype: Any, residuals, dc: jax.Array):
  a, b = residuals
  if contract_a == 1:
    da = dot(dc, b, 1, 1 - contract_b, dtype)
  else:
    da = dot(b, dc, 1 - contract_b, 1, dtype)
  if contract_b == 0:
    return da, dot(a, dc, 1 - contract_a, 0, dtype)
  return da, dot(dc, a, 0, 1 - contract_a, dtype)


dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _sum_lanes(
  table: jax.Array, transposed_CC: jax.Array, decays: list[jax.Array]
) -> list[jax.Array]:
  """Returns sums of the heads' log decays [C, K], in one product.

  Where operands are bfloat16 each log decay is two of them, which have 16 bits together.
  """
  wide_CX = jnp.concatenate(decays, axis=1)
  if table.dtype != jnp.float32:
    high_CX = wide_CX.astype(table.dtype)
    low_CX = (wide_CX - high_CX.astype(jnp.float32)).astype(table.dtype)
    wide_CX = jnp.concatenate([high_CX, low_CX])
  return _split_lanes(dot(table, wide_CX, 1, 0, table.dtype), len(decays))


def _split_lanes(x: jax.Array, parts: int) -> list[jax.Array]:
  width = x.shape[1] // parts
  return [x[:, i * width : (i + 1) * width] for i in range(parts)]


def _sum_lanes_backward(residuals, dsums: list[jax.Array]):
  table, transposed_CC = residuals
  wide_CX = dot(transposed_CC, jnp.concatenate(dsums, axis=1), 1, 0, table.dtype)
  zeros = jnp.zeros_like(table), jnp.zeros_like(transposed_CC)
  return *zeros, _split_lanes(wide_CX, len(dsums))


_sum_lanes.defvjp(
  lambda table, transposed_CC, decays: (
    _sum_lanes(table, transposed_CC, decays),
    (table, transposed_CC),
  ),
  _sum_lanes_backward,
)


def _invert_unit_lower(
  lowers: list[list[jax.Array]], tables: Tables
) -> Generator[None, None, list[jax.Array]]:
  """Returns (I + L)^-1 [C, C] of each L, given by groups of 8 rows; not to be differentiated.

  Inverses of halves are joined: below them is - X_1 L_10 X_0. Powers of L, which may overflow, are
  not needed. Inside of blocks of 8 the left operand is the blocks side by side, 8 rows in all.
  """
  lowers = jax.lax.stop_gradient(lowers)
  C, dtype = tables.level_CC.shape[0], tables.dtype
  levels, groups = C.bit_length() - 1, range(C // 8)
  level = [tables.level_CC[8 * i : 8 * i + 8] for i in groups]
  block_8C = jax.lax.broadcasted_iota(jnp.int32, (8, C), 1) // 8

  def spread(packed_8C: jax.Array) -> list[jax.Array]:
    return [jnp.where(block_8C == i, packed_8C, 0.0) for i in groups]

  def joined(lower: list[jax.Array], at: int, rows: list[int]) -> jax.Array:
    parts = [jnp.where(level[i] == at, lower[i], 0.0) for i in groups if i in rows]
    zeros = jnp.zeros_like(parts[0])
    return jnp.concatenate([parts[rows.index(i)] if i in rows else zeros for i in groups])

  inverses = []
  for lower in lowers:
    packed_8C = sum(jnp.where(block_8C == i, lower[i], 0.0) for i in groups)
    packed_8C = jnp.where(tables.level_8C == 0, -packed_8C, 0.0)
    inverses.append(packed_8C + jnp.where(tables.level_8C == levels, 1.0, 0.0))
  for at in (1, 2):
    products = [
      dot(packed_8C, joined(lower, at, list(groups)), 1, 0, dtype)
      for packed_8C, lower in zip(inverses, lowers)
    ]
    yield
    inverses = [
      packed_8C - dot(product_8C, jnp.concatenate(spread(packed_8C)), 1, 0, dtype)
      for packed_8C, product_8C in zip(inverses, products)
    ]
    yield
  rows_of = [spread(packed_8C) for packed_8C in inverses]
  for at in range(3, levels):
    behind = _rows_behind(at, C // 8)
    products = [
      dot(jnp.concatenate([rows[i] for i in behind]), joined(lower, at, behind), 1, 0, dtype)
      for rows, lower in zip(rows_of, lowers)
    ]
    yield
    for rows, product in zip(rows_of, products):
      below = split_rows(dot(product, jnp.concatenate(rows), 1, 0, dtype), 8)
      for i, below_8C in zip(behind, below):
        rows[i] = rows[i] - below_8C
    yield
  return [jnp.concatenate(rows) for rows in rows_of]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def solve_unit_lower(
  lower_CC: jax.Array, right_CV: jax.Array, inverse_CC: jax.Array, level_CC: jax.Array, dtype: Any
) -> jax.Array:
  """Returns (I + L)^-1 R for L below the diagonal, from the inverse; no gradient flows to that."""
  return _solve_forward(lower_CC, right_CV, inverse_CC, level_CC, dtype)[0]


def _solve_forward(lower_CC, right_CV, inverse_CC, level_CC, dtype: Any):
  x_CV = dot(inverse_CC, right_CV, 1, 0, dtype)
  return x_CV, (inverse_CC, x_CV, level_CC)


def _solve_backward(dtype: Any, residuals, dx_CV: jax.Array):
  inverse_CC, x_CV, level_CC = residuals
  dright_CV = dot(inverse_CC, dx_CV, 0, 0, dtype)
  levels = inverse_CC.shape[0].bit_length() - 1
  below = (level_CC >= 0) & (level_CC < levels)
  dlower_CC = jnp.where(below, -dot(dright_CV, x_CV, 1, 1, dtype), 0.0)
  return dlower_CC, dright_CV, jnp.zeros_like(inverse_CC), None


solve_unit_lower.defvjp(_solve_forward, _solve_backward)
