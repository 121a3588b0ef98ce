"""Computes one chunk of a head from tiles in a TPU's vector memory, and its gradient.

What `chunk.py` does, in the form that a matrix unit likes: only two-dimensional arrays, blocks of
positions told apart by masks, the state transposed so that a decay scales its lanes. What does not
need the state (`prepare`) is apart from what does (`finish`).
"""

# C positions of a chunk, K width of keys, V width of values, R kinds of rows: queries and, where
# there is erasing, erased keys; lists hold groups of 8 rows
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.terms import Gated
from pallas_kernels.delta_attention.tile_decays import (
  Decays,
  decays_of,
  multiply_decays,
  pull_decays,
)
from pallas_kernels.delta_attention.tile_inverse import invert_unit_lower
from pallas_kernels.delta_attention.tile_products import (
  Steps,
  Tables,
  dot,
  rows_behind,
  scaled,
  split_rows,
)

FORWARD_STAGES = (1, 3)
BACKWARD_STAGES = (0, 2)
"""Halvings, from 0, after which others may go on, besides the last: at each, sums are spilled."""


class Prepared(NamedTuple):
  """Holds what a chunk of one head needs besides the state."""

  rows: Any  # [R C, K] of the products' dtype, decayed from the chunk's start
  k: Any  # [C, K] of the products' dtype, decayed to the chunk's end
  v: Any  # [C, V] float32
  visible: Any  # [C, C] of the products' dtype: q_i . (decay_ij k_j) for j <= i
  lower: Any  # None or [C, C] float32: (b k)_i . (decay_ij k_j) for j < i
  total: Any  # None or [1, K] float32, the sum of log decays


def prepare(gated: Gated, tables: Tables) -> Steps:
  """Returns what a chunk needs besides the state; yields where other heads may go on."""
  dtype = tables.dtype
  yield
  decays = None if gated.decay is None else multiply_decays(gated.decay)
  yield
  kinds = [split_rows(x) for x in (gated.q, gated.erased_k) if x is not None]
  pairs = yield from _multiply_pairs(gated, kinds, decays, tables)
  if decays is None:
    rows, k_CK, total = kinds, gated.k, None
  else:
    rows = [[x * f for x, f in zip(kind, decays.from_start)] for kind in kinds]
    k_CK = gated.k * jnp.concatenate(decays.to_end)
    total = _sum_rows(gated.decay)
  return Prepared(
    rows=jnp.concatenate([x for kind in rows for x in kind]).astype(dtype),
    k=k_CK.astype(dtype),
    v=gated.v,
    visible=jnp.concatenate(pairs[0]).astype(dtype),
    lower=jnp.concatenate(pairs[1]) if len(pairs) > 1 else None,
    total=total,
  )


def _sum_rows(x: Any) -> jax.Array:
  """Returns the sum over positions, [1, width]."""
  return jnp.sum(x, axis=0, keepdims=True)


def _multiply_pairs(
  gated: Gated, kinds: list[list[jax.Array]], decays: Decays | None, tables: Tables
) -> Steps:
  """Returns the products of decayed rows and keys, for each kind of rows; yields in between."""
  k, level_of = split_rows(gated.k), split_rows(tables.level_CC)
  diagonal = split_rows(jnp.sum(gated.q * gated.k, axis=1, keepdims=True))
  pairs = [[jnp.where(x == tables.levels, y, 0.0) for x, y in zip(level_of, diagonal)]]
  if len(kinds) > 1:
    pairs.append([jnp.zeros(x.shape, jnp.float32) for x in level_of])
  for level in range(tables.levels):
    rows, keys = _operands(kinds, k, decays, level)
    behind = rows_behind(level, len(k))
    products = split_rows(dot(jnp.concatenate(rows), jnp.concatenate(keys), 1, 1, tables.dtype))
    for kind, part in enumerate(pairs):
      for at, i in enumerate(behind):
        product_8C = products[kind * len(behind) + at]
        part[i] = jnp.where(level_of[i] == level, product_8C, part[i])
    if level in FORWARD_STAGES:
      yield
  yield
  return pairs


def _operands(
  kinds: list[list[jax.Array]], k: list[jax.Array], decays: Decays | None, level: int
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns decayed rows behind the middles of a halving's blocks, and keys decayed to there."""
  before, after = decays_of(decays, level, len(k))
  behind = rows_behind(level, len(k))
  rows = [scaled(kind[i], before[i]) for kind in kinds for i in behind]
  keys = [x if level >= 3 and i in behind else scaled(x, after[i]) for i, x in enumerate(k)]
  return rows, keys


def solve(heads: list[Prepared], states: list[Any], tables: Tables) -> Steps:
  """Returns what each head's queries read of the state, what is added to it, and the inverse.

  [C, V], [C, V] and (I + lower)^-1 [C, C], or None where nothing is erased. Heads and states are
  references. Yields where other computations may go on.
  """
  C, dtype = tables.level_CC.shape[0], tables.dtype
  reads = [
    split_rows(dot(head.rows[...], state_VK[...], 1, 1, dtype), C)
    for head, state_VK in zip(heads, states)
  ]
  yield
  if heads[0].lower is None:
    return [(read[0], head.v[...], None) for head, read in zip(heads, reads)]
  inverses = yield from invert_unit_lower([split_rows(head.lower[...]) for head in heads], tables)
  solved = []
  for head, read, inverse_CC in zip(heads, reads, inverses):
    added_CV = dot(inverse_CC, head.v[...] - read[1], 1, 0, dtype)
    solved.append((read[0], added_CV, inverse_CC))
  yield
  return solved


def attend(
  head: Prepared, state_VK: jax.Array, read_CV: jax.Array, added_CV: jax.Array, tables: Tables
) -> tuple[jax.Array, jax.Array]:
  """Returns a head's output [C, V] and the state after the chunk."""
  o_CV = read_CV + dot(head.visible[...], added_CV, 1, 0, tables.dtype)
  if head.total is not None:
    state_VK = jnp.exp(head.total[...]) * state_VK
  return o_CV, state_VK + dot(added_CV, head.k[...], 0, 0, tables.dtype)


class Saved(NamedTuple):
  """Holds what the backward pass does not compute again, of the products' dtype."""

  state_VK: jax.Array  # at the chunk's start
  visible_CC: jax.Array
  inverse_CC: Any  # None where nothing is erased


def pull(
  gated: Gated, saved: Saved, do_CV: jax.Array, dnext_VK: jax.Array, tables: Tables
) -> Steps:
  """Returns the gradients of a chunk's gated tokens and of the state at its start, transposed.

  From those of its output and of the state after it; yields where other heads may go on.
  """
  dtype, C = tables.dtype, do_CV.shape[0]
  erases = saved.inverse_CC is not None
  decays = None if gated.decay is None else multiply_decays(gated.decay)
  kinds = [split_rows(x) for x in (gated.q, gated.erased_k) if x is not None]
  from_start: list[Any] = [None] * len(kinds[0])
  if decays is not None:
    from_start = decays.from_start
  rows = [scaled(x, f) for kind in kinds for x, f in zip(kind, from_start)]
  rows_RK = jnp.concatenate(rows).astype(dtype)
  to_end = None if decays is None else jnp.concatenate(decays.to_end)
  k_CK, state_VK = scaled(gated.k, to_end), saved.state_VK
  added_CV = gated.v
  if erases:
    added_CV = gated.v - dot(rows_RK[C:], state_VK, 1, 1, dtype)
  dadded_CV = dot(saved.visible_CC, do_CV, 0, 0, dtype) + dot(k_CK, dnext_VK, 1, 1, dtype)
  yield
  dright_CV, drows_CV = dadded_CV, [do_CV]
  if erases:
    added_CV = dot(saved.inverse_CC, added_CV, 1, 0, dtype)
    dright_CV = dot(saved.inverse_CC, dadded_CV, 0, 0, dtype)
    drows_CV.append(-dright_CV)
  yield
  drows_RV = jnp.concatenate(drows_CV)
  dpairs_RC = dot(drows_RV, added_CV, 1, 1, dtype)
  drows_RK = dot(drows_RV, state_VK, 1, 0, dtype)
  dk_CK = dot(added_CV, dnext_VK, 1, 0, dtype)
  dstate_VK = dot(drows_RV, rows_RK, 0, 0, dtype)
  dtotal_1K: Any = None
  if decays is not None:
    total_1K = jnp.exp(_sum_rows(gated.decay))
    kept_VK = total_1K * dnext_VK
    dtotal_1K = _sum_rows(kept_VK * state_VK.astype(jnp.float32))
    dnext_VK = kept_VK
  yield
  drows = [split_rows(x) for x in split_rows(drows_RK, C)]
  dkinds = [[scaled(x, f) for x, f in zip(kind, from_start)] for kind in drows]
  dk = split_rows(scaled(dk_CK, to_end))
  if decays is not None:
    products = [[x * dx for x, dx in zip(*of_kind)] for of_kind in zip(kinds, dkinds)]
    starts = products[0] if len(products) == 1 else [x + y for x, y in zip(*products)]
    ends = [x * dx for x, dx in zip(split_rows(gated.k), dk)]
  halves = yield from _pull_pairs(gated, kinds, dkinds, dk, dpairs_RC, decays, tables)
  ddecay_CK = None
  if decays is not None:
    ddecay_CK = pull_decays(halves, starts, ends, tables) + dtotal_1K
  dgated = Gated(
    q=jnp.concatenate(dkinds[0]),
    k=jnp.concatenate(dk),
    erased_k=jnp.concatenate(dkinds[1]) if erases else None,
    v=dright_CV,
    decay=ddecay_CK,
  )
  return dgated, dnext_VK + dstate_VK


def _pull_pairs(
  gated: Gated,
  kinds: list[list[jax.Array]],
  dkinds: list[list[jax.Array]],
  dk: list[jax.Array],
  dpairs_RC: jax.Array,
  decays: Decays | None,
  tables: Tables,
) -> Steps:
  """Adds the gradients of pairs to those of rows and keys; yields in between.

  Returns the gradients of the logarithms of the halvings' decays.
  """
  k, q, level_of = split_rows(gated.k), kinds[0], split_rows(tables.level_CC)
  groups, halves = len(k), []
  dpairs = split_rows(dpairs_RC)
  for i in range(groups):
    ddiagonal_8C = jnp.where(level_of[i] == tables.levels, dpairs[i], 0.0)
    ddiagonal_81 = jnp.sum(ddiagonal_8C, axis=1, keepdims=True)
    dkinds[0][i] = dkinds[0][i] + ddiagonal_81 * k[i]
    dk[i] = dk[i] + ddiagonal_81 * q[i]
  yield
  for level in range(tables.levels):
    behind = rows_behind(level, groups)
    rows, keys = _operands(kinds, k, decays, level)
    masked = [
      jnp.where(level_of[i] == level, dpairs[kind * groups + i], 0.0)
      for kind in range(len(kinds))
      for i in behind
    ]
    masked_RC = jnp.concatenate(masked)
    drows = split_rows(dot(masked_RC, jnp.concatenate(keys), 1, 0, tables.dtype))
    dkeys = split_rows(dot(masked_RC, jnp.concatenate(rows), 0, 0, tables.dtype))
    before, after = decays_of(decays, level, groups)
    sums: list[Any] = [None] * groups
    for kind, (x, dx) in enumerate(zip(kinds, dkinds)):
      for at, i in enumerate(behind):
        drow_8K = scaled(drows[kind * len(behind) + at], before[i])
        dx[i] = dx[i] + drow_8K
        sums[i] = x[i] * drow_8K if sums[i] is None else sums[i] + x[i] * drow_8K
    for i in range(groups):
      if level < 3 or i not in behind:
        dkey_8K = scaled(dkeys[i], after[i])
        dk[i] = dk[i] + dkey_8K
        sums[i] = k[i] * dkey_8K if sums[i] is None else sums[i] + k[i] * dkey_8K
    halves.append(sums)
    if level in BACKWARD_STAGES:
      yield
  yield
  return halves
