"""Computes every branch with all of its logits in memory; what other forms are compared with.

Everything is float32, or float64 for float64 inputs, also where the inputs are narrower.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values, C compressed blocks, J blocks of a segment,
# I selected blocks of a query
from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.places import BlockSizes, Options, Places, visible_blocks


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  indices_BTKI: jax.Array,
  places: Places,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, U] of the selected branch and its logsumexp [B, T, N]."""
  mask_BTKS = selected_tokens(indices_BTKI, places, k_BSKH.shape[1], options.sizes.block)
  return masked_attention(q_BTNH, k_BSKH, v_BSKU, mask_BTKS, options.scale)[:2]


def compress_and_select(
  q_BTNH: jax.Array,
  k_BCKH: jax.Array,
  v_BCKU: jax.Array,
  starts_BC: jax.Array,
  places: Places,
  S: int,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns output and logsumexp of the compressed branch, and the selected blocks."""
  sizes = options.sizes
  seen_BTC = visible_blocks(places, starts_BC, sizes.length)
  mask_BTKC = jnp.broadcast_to(seen_BTC[:, :, None], (*seen_BTC.shape[:2], 1, starts_BC.shape[1]))
  arrays = (q_BTNH, k_BCKH, v_BCKU)
  o_BTNU, lse_BTN, p_BTKGC = masked_attention(*arrays, mask_BTKC, options.scale)
  scores_BTKJ = pooled(jax.lax.stop_gradient(p_BTKGC), starts_BC, places, S, sizes)
  return o_BTNU, lse_BTN, chosen_blocks(scores_BTKJ, places, sizes)


def selected_tokens(indices_BTKI: jax.Array, places: Places, S: int, block: int) -> jax.Array:
  """Returns bool [B, T, K, S]: whether the query attends to the token.

  Entries of `indices_BTKI` that name no block, and second entries of the same, have no effect.
  """
  firsts_BT = places.starts_BT()
  positions_BT11, firsts_BT11 = places.positions_BT[..., None, None], firsts_BT[..., None, None]
  s_S = jnp.arange(S, dtype=jnp.int32)[None, None, None]
  visible_BTKS = (s_S <= positions_BT11) & (s_S >= firsts_BT11)
  block_BTKS = (s_S - firsts_BT11) // block
  in_list_BTKS = jnp.any(indices_BTKI[..., None, :] == block_BTKS[..., None], axis=-1)
  return visible_BTKS & in_list_BTKS


def masked_attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, mask_BTKS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns output [B, T, N, U], logsumexp [B, T, N] and probabilities [B, T, K, G, S]."""
  B, T, N, H = q_BTNH.shape
  K, U = v_BSKU.shape[2:]
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.astype(dtype).reshape(B, T, K, N // K, H)
  mask_BTKGS = mask_BTKS[..., None, :]
  a_BTKGS = scale * _dot("btkgh,bskh->btkgs", q_BTKGH, k_BSKH.astype(dtype))
  a_BTKGS = jnp.where(mask_BTKGS, a_BTKGS, -jnp.inf)
  max_BTKG1 = jax.lax.stop_gradient(jnp.max(a_BTKGS, axis=-1, keepdims=True, initial=-jnp.inf))
  max_BTKG1 = jnp.where(jnp.isneginf(max_BTKG1), 0, max_BTKG1)  # of a row that sees no key
  e_BTKGS = jnp.exp(a_BTKGS - max_BTKG1)
  mass_BTKG1 = jnp.sum(e_BTKGS, axis=-1, keepdims=True)
  blind_BTKG1 = mass_BTKG1 == 0
  mass_BTKG1 = jnp.where(blind_BTKG1, 1, mass_BTKG1)
  p_BTKGS = jnp.where(mask_BTKGS, e_BTKGS / mass_BTKG1, 0)  # also of a query with NaN
  o_BTKGU = _weighted_sum("btkgs,bsku->btkgu", p_BTKGS, v_BSKU.astype(dtype))
  lse_BTKG1 = jnp.where(blind_BTKG1, -jnp.inf, max_BTKG1 + jnp.log(mass_BTKG1))
  o_BTNU = o_BTKGU.reshape(B, T, N, U).astype(q_BTNH.dtype)
  return o_BTNU, lse_BTKG1.reshape(B, T, N), p_BTKGS


def pooled(
  p_BTKGC: jax.Array, starts_BC: jax.Array, places: Places, S: int, sizes: BlockSizes
) -> jax.Array:
  """Returns the scores of blocks [B, T, K, J], arXiv 2502.11089, equations 9 and 10.

  Writes out sum_m sum_r p[j l'/d + m - r], where the compressed block i of a segment is the one
  that starts i strides after the segment.
  """
  J = -(-S // sizes.block)
  firsts_BT = places.starts_BT()
  p_BTKC = jnp.sum(p_BTKGC, axis=3)
  i_BTC = (starts_BC[:, None] - firsts_BT[..., None]) // sizes.stride
  scores = []
  for j in range(J):
    weight_BTC = jnp.zeros(i_BTC.shape, p_BTKC.dtype)
    for m in range(sizes.block // sizes.stride):
      for r in range(sizes.length // sizes.stride):
        weight_BTC += i_BTC == j * sizes.block // sizes.stride + m - r
    counted_BTKC = (weight_BTC > 0)[:, :, None] & (p_BTKC != 0)  # 0 * NaN is NaN
    scores.append(jnp.sum(jnp.where(counted_BTKC, weight_BTC[:, :, None] * p_BTKC, 0), axis=-1))
  return jnp.stack(scores, axis=-1)


def chosen_blocks(scores_BTKJ: jax.Array, places: Places, sizes: BlockSizes) -> jax.Array:
  """Returns the best blocks of each query [B, T, K, I], ascending, then -1; by a stable sort."""
  J = scores_BTKJ.shape[-1]
  own_BT = jnp.where(places.positions_BT < 0, -1, places.offsets_BT() // sizes.block)
  own_BTKJ = own_BT[..., None, None]
  j_J = jnp.arange(J)[None, None, None]
  forced_BTKJ = (j_J == 0) | (j_J == own_BTKJ) | (j_J == own_BTKJ - 1)
  scores_BTKJ = jnp.where(forced_BTKJ, jnp.inf, scores_BTKJ)
  order_BTKJ = jnp.argsort(jnp.where(j_J > own_BTKJ, jnp.inf, -scores_BTKJ), axis=-1, stable=True)
  available_BTKJ = order_BTKJ <= own_BTKJ
  best_BTKI = jnp.where(available_BTKJ, order_BTKJ, J)[..., : sizes.count]
  missing = max(0, sizes.count - J)
  best_BTKI = jnp.pad(best_BTKI, [(0, 0)] * 3 + [(0, missing)], constant_values=J)
  best_BTKI = jnp.sort(best_BTKI, axis=-1)
  return jnp.where(best_BTKI == J, -1, best_BTKI).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Contracts two arrays; for gradients 0 times what is not finite is 0."""
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Contracts two arrays where 0 times what is not finite is 0, and so for gradients."""
  dot = functools.partial(jnp.einsum, spec, precision=jax.lax.Precision.HIGHEST)
  x_finite, y_finite = jnp.isfinite(x), jnp.isfinite(y)
  meets_bad = dot(1.0 * ((x != 0) & x_finite), 1.0 * ~y_finite)
  meets_bad += dot(1.0 * ~x_finite, 1.0 * (y != 0))
  z = dot(jnp.where(x_finite, x, 0), jnp.where(y_finite, y, 0))
  return jnp.where(meets_bad > 0, jnp.nan, z)


def _backward(spec: str, factors: Any, dz: jax.Array) -> tuple[jax.Array, jax.Array]:
  (of_x, of_y, of_z), (x, y) = re.split(",|->", spec), factors
  dx = _weighted_sum(f"{of_z},{of_y}->{of_x}", dz, y)
  return dx, _weighted_sum(f"{of_z},{of_x}->{of_y}", dz, x)


_dot.defvjp(lambda spec, x, y: (_dot(spec, x, y), (x, y)), _backward)
_weighted_sum.defvjp(lambda spec, x, y: (_weighted_sum(spec, x, y), (x, y)), _backward)
