"""Computes one chunk of one head with products, from the state at its start: plain JAX.

All decays inside of a chunk are exponentials of sums of log decays, never of differences: those
between positions i > j are split where a block of 2, 4, .. C positions that holds both is halved,
into the sum from the middle to i and the sum from j to the middle. So no exponent is above 0, none
is the difference of large numbers, and any log decay from 0 to minus infinity is exact.
"""

# C positions of a chunk, K width of keys, V width of values, L positions of a block, M blocks,
# H halvings; X is K or 1
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_attention.terms import Gated

SMALL_BLOCK = 16
"""Blocks that are halved together, by masks."""


class Decays(NamedTuple):
  """Holds sums of log decays inside of M blocks of L positions."""

  to_here: jax.Array  # [M, L, X], from the block's start up to and with each position
  to_end: jax.Array  # [M, L, X], after each position up to the block's end
  total: jax.Array  # [M, 1, X]


def attend_to_chunk(gated: Gated, state_KV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the output [C, V] of a chunk of one head and the state after it.

  With A_ij = (b k)_i . (decay_ij k_j) for j < i and P_ij = q_i . (decay_ij k_j) for j <= i, what
  the tokens add to the state is R = (I + A)^-1 (w v - (decay b k) S), the output is
  (decay q) S + P R, the next state decay S + (decay k)^T R.

  Source: arXiv 2510.26692, equations 6 to 9, with separate erase and write gates.
  """
  q_CK, k_CK, erased_CK, v_CV, decay = gated
  pairs, decays = _pair_products(q_CK, k_CK, erased_CK, decay)
  added_CV = v_CV
  from_start_CX = None if decays is None else jnp.exp(decays.to_here[0])
  if erased_CK is not None:
    read_CV = _dot("ck,kv->cv", _scaled(erased_CK, from_start_CX), state_KV)
    added_CV = solve_unit_lower(pairs[1], v_CV - read_CV)
  o_CV = _dot("ck,kv->cv", _scaled(q_CK, from_start_CX), state_KV)
  o_CV = o_CV + _dot("cd,dv->cv", pairs[0], added_CV)
  if decays is not None:
    k_CK = k_CK * jnp.exp(decays.to_end[0])
    state_KV = jnp.exp(decays.total[0]).T * state_KV
  return o_CV, state_KV + _dot("ck,cv->kv", k_CK, added_CV)


class ChunkOperands(NamedTuple):
  """Holds what the step over a chunk multiplies; only the state at its start is missing.

  The tokens add R = U - W S to the state, the output is Q S + P R, the next state decay S + K^T R.
  """

  q_CK: jax.Array  # decayed from the chunk's start
  k_CK: jax.Array  # decayed to its end
  visible_CC: jax.Array  # P
  added_CV: jax.Array  # U = (I + A)^-1 w v
  erased_CK: jax.Array | None  # W = (I + A)^-1 (decay b k); None where nothing is erased
  decay_K: jax.Array  # of the state


def make_operands(gated: Gated) -> ChunkOperands:
  """Returns the operands of a chunk of one head, as `attend_to_chunk` would multiply them."""
  q_CK, k_CK, erased_CK, added_CV, decay = gated
  pairs, decays = _pair_products(q_CK, k_CK, erased_CK, decay)
  from_start_CX = None if decays is None else jnp.exp(decays.to_here[0])
  if erased_CK is not None:
    right = jnp.concatenate([added_CV, _scaled(erased_CK, from_start_CX)], axis=1)
    added_CV, erased_CK = jnp.split(solve_unit_lower(pairs[1], right), [added_CV.shape[1]], axis=1)
  return ChunkOperands(
    q_CK=_scaled(q_CK, from_start_CX),
    k_CK=k_CK if decays is None else k_CK * jnp.exp(decays.to_end[0]),
    visible_CC=pairs[0],
    added_CV=added_CV,
    erased_CK=erased_CK,
    decay_K=jnp.ones_like(k_CK[0]) * (1 if decays is None else jnp.exp(decays.total[0, 0])),
  )


def _scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
  return x if factor is None else x * factor


def _pair_products(
  q_CK: jax.Array, k_CK: jax.Array, erased_CK: jax.Array | None, decay_CX: jax.Array | None
) -> tuple[list[jax.Array], Decays | None]:
  """Returns P [C, C] and, where there is erasing, A [C, C], and the chunk's decays."""
  rows = [q_CK] if erased_CK is None else [q_CK, erased_CK]
  C = k_CK.shape[0]
  if decay_CX is None or decay_CX.shape[1] == 1:
    products = [_dot("ck,dk->cd", x_CK, k_CK) for x_CK in rows]
    if decay_CX is None:
      return [jnp.tril(x, -i) for i, x in enumerate(products)], None
    one_C1 = jnp.ones_like(decay_CX)
    (decay_CC,), decays = _lower_blocks([one_C1], one_C1, decay_CX)
    decay_CC = decay_CC + jnp.eye(C, dtype=decay_CC.dtype)
    return [jnp.tril(x, -i) * decay_CC for i, x in enumerate(products)], decays
  pairs, decays = _lower_blocks(rows, k_CK, decay_CX)
  diagonal_C = jnp.sum(q_CK * k_CK, axis=-1)
  pairs[0] = pairs[0] + jnp.diag(diagonal_C)
  return pairs, decays


def _lower_blocks(
  rows: list[jax.Array], k_CK: jax.Array, decay_CX: jax.Array
) -> tuple[list[jax.Array], Decays]:
  """Returns x_i . (decay_ij k_j) for j < i, else 0, [C, C] for each x of `rows`, and the decays."""
  C, L = k_CK.shape[0], min(SMALL_BLOCK, k_CK.shape[0])
  products, decays = _small_blocks(rows, k_CK, decay_CX, L)
  while L < C:
    halves: Decays = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), decays)
    first, second = (jax.tree.map(lambda x, i=i: x[:, i], halves) for i in range(2))
    k_MLK = k_CK.reshape(-1, 2, L, k_CK.shape[1])[:, 0] * jnp.exp(first.to_end)
    to_here = jnp.exp(second.to_here)
    lowers = _dot_rows([x.reshape(-1, 2, L, x.shape[1])[:, 1] * to_here for x in rows], k_MLK)
    upper_MLL = jnp.zeros_like(lowers[0])
    products = [
      jnp.block([[x_MLL[::2], upper_MLL], [lower_MLL, x_MLL[1::2]]])
      for x_MLL, lower_MLL in zip(products, lowers)
    ]
    decays = Decays(
      to_here=jnp.concatenate([first.to_here, first.total + second.to_here], axis=1),
      to_end=jnp.concatenate([first.to_end + second.total, second.to_end], axis=1),
      total=first.total + second.total,
    )
    L = 2 * L
  return [products_MLL[0] for products_MLL in products], decays


def _small_blocks(
  rows: list[jax.Array], k_CK: jax.Array, decay_CX: jax.Array, L: int
) -> tuple[list[jax.Array], Decays]:
  """Returns the products inside of blocks of L positions, [M, L, L], and the blocks' decays.

  Halvings and kinds of rows are added one by one: on jax 0.10.2 XLA crashes on CPU in the sums
  over such axes that a gradient under vmap has.
  """
  sums, masks_HLL = halvings(L)
  g_MLX = decay_CX.reshape(-1, L, decay_CX.shape[1])
  sums_HMLX = _dot("hij,mjx->hmix", jnp.asarray(sums, g_MLX.dtype), g_MLX)
  rows = [x.reshape(-1, L, x.shape[1]) for x in rows]
  k_MLK = k_CK.reshape(-1, L, k_CK.shape[1])
  products = [jnp.zeros((x.shape[0], L, L), x.dtype) for x in rows]
  for h, mask_LL in enumerate(masks_HLL):
    factor_MLX = jnp.exp(sums_HMLX[h])
    here = _dot_rows([x * factor_MLX for x in rows], k_MLK * factor_MLX)
    products = [jnp.where(jnp.asarray(mask_LL)[None], x, y) for x, y in zip(here, products)]
  to_here, to_end = sums_HMLX[-2:]
  return products, Decays(to_here, to_end, to_here[:, -1:])


def _dot_rows(rows: list[jax.Array], k_MLK: jax.Array) -> list[jax.Array]:
  """Returns [M, L, L] of each of the rows [M, L, K] and keys, with all rows in one product."""
  L = k_MLK.shape[1]
  products = _dot("mik,mjk->mij", jnp.concatenate(rows, axis=1), k_MLK)
  return [products[:, i * L : (i + 1) * L] for i in range(len(rows))]


@functools.cache
def halvings(L: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns what sums log decays in a block of L positions, and which pairs a sum is for.

  Halving 0, 1, .. of H cuts blocks of 2, 4, .. L positions in the middle. Its sums, [L, L] of 0
  and 1, are from the middle to each position behind it, and from each position before it to the
  middle; its pairs, bool [L, L], are of one block, on two sides of the middle. Two more sums lead
  from the start to each position, and from there to the end.
  """
  i, j = np.arange(L)[:, None], np.arange(L)[None]
  sums, masks = [], []
  for half in (2**h for h in range(L.bit_length() - 1)):
    middle, same = i // (2 * half) * 2 * half + half, i // (2 * half) == j // (2 * half)
    behind = i >= middle
    sums.append(np.where(behind, (middle <= j) & (j <= i), (i < j) & (j < middle)))
    masks.append(same & behind & (j < middle))
  masks_HLL = np.array(masks, bool).reshape(-1, L, L)
  return np.array([*sums, j <= i, j > i], np.float32), masks_HLL


@jax.custom_vjp
def solve_unit_lower(lower_CC: jax.Array, right_CV: jax.Array) -> jax.Array:
  """Returns (I + L)^-1 R for L below the diagonal, which is 0 elsewhere."""
  return _dot("cd,dv->cv", invert_unit_lower(lower_CC), right_CV)


def _solve_forward(lower_CC: jax.Array, right_CV: jax.Array):
  inverse_CC = invert_unit_lower(lower_CC)
  x_CV = _dot("cd,dv->cv", inverse_CC, right_CV)
  return x_CV, (inverse_CC, x_CV)


def _solve_backward(residuals, dx_CV: jax.Array):
  inverse_CC, x_CV = residuals
  dright_CV = _dot("cd,cv->dv", inverse_CC, dx_CV)
  return jnp.tril(-_dot("cv,dv->cd", dright_CV, x_CV), -1), dright_CV


solve_unit_lower.defvjp(_solve_forward, _solve_backward)


def invert_unit_lower(lower_CC: jax.Array) -> jax.Array:
  """Returns (I + L)^-1 by joining the inverses of two halves: below them is - X_1 L_10 X_0.

  Powers of L, which may overflow, are not needed.
  """
  C = lower_CC.shape[0]
  L = min(SMALL_BLOCK, C)
  blocks = lower_CC.reshape(C // L, L, C // L, L)
  lower_MLL = jnp.stack([blocks[m, :, m] for m in range(C // L)])
  inverse_MLL = jnp.broadcast_to(jnp.eye(L, dtype=lower_CC.dtype), lower_MLL.shape)
  for mask_LL in halvings(L)[1]:
    joined_MLL = jnp.where(jnp.asarray(mask_LL)[None], lower_MLL, 0)
    product_MLL = _dot("mij,mjk->mik", inverse_MLL, joined_MLL)
    inverse_MLL = inverse_MLL - _dot("mij,mjk->mik", product_MLL, inverse_MLL)
  while L < C:
    first_MLL, second_MLL = inverse_MLL[::2], inverse_MLL[1::2]
    blocks = lower_CC.reshape(C // L, L, C // L, L)
    joined_MLL = jnp.stack([blocks[m + 1, :, m] for m in range(0, C // L, 2)])
    product_MLL = _dot("mij,mjk->mik", second_MLL, joined_MLL)
    below_MLL = -_dot("mij,mjk->mik", product_MLL, first_MLL)
    above_MLL = jnp.zeros_like(below_MLL)
    inverse_MLL = jnp.block([[first_MLL, above_MLL], [below_MLL, second_MLL]])
    L = 2 * L
  return inverse_MLL[0]


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)
