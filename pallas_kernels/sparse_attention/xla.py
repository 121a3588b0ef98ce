"""Attends to selected blocks in plain JAX, by the queries of each block; memory is linear in T.

Forward: the chunks of `pairs.py` run one after another; each adds a block's part to the running
maximum, mass and output of its queries. Backward: the chunks run again with the probabilities that
follow from the logsumexp; only selected blocks are visited, in both passes.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values, I selected blocks of a query, Z = B * K * T rows
# of queries (and one more, for the pairs that a chunk lacks), Y = B * K * S places of keys,
# R pairs of a chunk, L tokens of a block
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.sparse_attention import nonfinite, pairs
from pallas_kernels.sparse_attention.places import Options, Places

CHUNK_ROWS = 1024  # of the products: R * G
FEW_QUERIES = 8  # up to which keys are gathered for each query, as in decoding


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  indices_BTKI: jax.Array,
  places: Places,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, U] and the logsumexp of the logits [B, T, N]."""
  B, T, N, H = q_BTNH.shape
  S, K, U = v_BSKU.shape[1:]
  block = options.sizes.block
  start_BTKI = pairs.selected_starts(indices_BTKI, places, S, block)
  if T <= FEW_QUERIES:
    return _attend_gathered(q_BTNH, k_BSKH, v_BSKU, start_BTKI, places, options)
  R = max(16, min(256, CHUNK_ROWS * K // N // 16 * 16))
  chunks = pairs.make_chunks(start_BTKI, S, block, R)
  q_ZGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(-1, N // K, H)
  positions_BKT = jnp.broadcast_to(places.positions_BT[:, None], (B, K, T))
  # a chunk's missing pairs have a row that sees nothing
  q_ZGH = jnp.pad(q_ZGH, ((0, 1), (0, 0), (0, 0)))
  position_Z = jnp.pad(positions_BKT.reshape(-1), (0, 1), constant_values=-1)
  # so that a row's last block can be read whole; the next head's keys are masked by position
  k_YH = jnp.pad(k_BSKH.swapaxes(1, 2).reshape(-1, H), ((0, block), (0, 0)))
  v_YU = jnp.pad(v_BSKU.swapaxes(1, 2).reshape(-1, U), ((0, block), (0, 0)))
  static = (S, R, block, options.scale)
  o_ZGU, lse_ZG = _attend(q_ZGH, k_YH, v_YU, position_Z, chunks, static)
  o_BTNU = o_ZGU[:-1].reshape(B, K, T, N // K, U).swapaxes(1, 2).reshape(B, T, N, U)
  lse_BTN = lse_ZG[:-1].reshape(B, K, T, N // K).swapaxes(1, 2).reshape(B, T, N)
  return o_BTNU, lse_BTN


def _attend_gathered(q_BTNH, k_BSKH, v_BSKU, start_BTKI, places, options):
  """Attends to keys that are gathered for each query: for few of them, and by the same rules."""
  B, T, N, H = q_BTNH.shape
  S, K, U = v_BSKU.shape[1:]
  L = options.sizes.block
  at_BTKIL = start_BTKI[..., None] + jnp.arange(L, dtype=jnp.int32)[None, None, None, None]
  seen_BTKIL = at_BTKIL <= places.positions_BT[..., None, None, None]
  seen_BTKIL &= (start_BTKI < S)[..., None]
  at_BTKS, seen_BTKS = (x.reshape(B, T, K, -1) for x in (at_BTKIL, seen_BTKIL))

  @jax.vmap
  def gather(x_SKH: jax.Array, at_TKS: jax.Array) -> jax.Array:
    return x_SKH.at[at_TKS, jnp.arange(K)[None, :, None]].get(mode="fill", fill_value=0)

  # 0 where nothing is seen, so that no NaN of a token, or of its query's gradient, goes there
  k_BTKSH, v_BTKSU = (
    jnp.where(seen_BTKS[..., None], gather(x_BSKH, at_BTKS), 0) for x_BSKH in (k_BSKH, v_BSKU)
  )
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  a_BTKGS = options.scale * _dot("btkgh,btksh->btkgs", q_BTKGH, k_BTKSH)
  a_BTKGS = jnp.where(seen_BTKS[..., None, :], a_BTKGS, -jnp.inf)
  max_BTKG1 = _finite(jax.lax.stop_gradient(jnp.max(a_BTKGS, axis=-1, keepdims=True)))
  e_BTKGS = jnp.exp(a_BTKGS - max_BTKG1)
  mass_BTKG1 = jnp.sum(e_BTKGS, axis=-1, keepdims=True)
  blind_BTKG1 = mass_BTKG1 == 0
  mass_BTKG1 = jnp.where(blind_BTKG1, 1, mass_BTKG1)
  p_BTKGS = (e_BTKGS / mass_BTKG1).astype(v_BSKU.dtype)
  o_BTNU = _dot("btkgs,btksu->btkgu", p_BTKGS, v_BTKSU).reshape(B, T, N, U)
  lse_BTKG1 = jnp.where(blind_BTKG1, -jnp.inf, max_BTKG1 + jnp.log(mass_BTKG1))
  return o_BTNU.astype(q_BTNH.dtype), lse_BTKG1.reshape(B, T, N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_ZGH, k_YH, v_YU, position_Z, chunks, static):
  return _forward(q_ZGH, k_YH, v_YU, position_Z, chunks, static)[0]


def _forward(q_ZGH, k_YH, v_YU, position_Z, chunks, static):
  S, R, L, scale = static
  (Z, G, _), U = q_ZGH.shape, v_YU.shape[1]
  dtype = jnp.promote_types(q_ZGH.dtype, jnp.float32)
  like = (q_ZGH, k_YH, v_YU, position_Z, chunks)

  def add_chunk(chunk, running):
    max_ZG, mass_ZG, o_ZGU = running
    row_R, place = chunks.rows_of(chunk, R)
    k_LH, v_LU = _block(k_YH, place, L), _block(v_YU, place, L)
    mask_RL = _mask(position_Z[row_R], place, S, L)
    v_LU, poison_RU = _hide_nan(v_LU, mask_RL)
    a_RGL = _logits(q_ZGH[row_R], k_LH, mask_RL, scale)
    old_RG, top_RG = max_ZG[row_R], jnp.max(a_RGL, axis=-1)
    new_RG = jnp.maximum(old_RG, top_RG)
    finite_RG = _finite(new_RG)
    e_RGL = jnp.exp(a_RGL - finite_RG[..., None])
    kept_RG = jnp.exp(old_RG - finite_RG)
    mass_RG = mass_ZG[row_R] * kept_RG + jnp.sum(e_RGL, axis=-1)
    o_RGU = _dot("rgl,lu->rgu", e_RGL.astype(v_LU.dtype), v_LU) + poison_RU[:, None]
    o_RGU += o_ZGU[row_R] * kept_RG[..., None]
    return (
      max_ZG.at[row_R].set(new_RG),
      mass_ZG.at[row_R].set(mass_RG),
      o_ZGU.at[row_R].set(o_RGU),
    )

  zero_ZG, zero_ZGU = (zeros_varying_like(shape, dtype, *like) for shape in ((Z, G), (Z, G, U)))
  start = (zero_ZG - jnp.inf, zero_ZG, zero_ZGU)
  max_ZG, mass_ZG, o_ZGU = jax.lax.fori_loop(0, chunks.chunks, add_chunk, start)
  blind_ZG = mass_ZG == 0
  mass_ZG = jnp.where(blind_ZG, 1, mass_ZG)
  lse_ZG = jnp.where(blind_ZG, -jnp.inf, max_ZG + jnp.log(mass_ZG))
  o_ZGU = (o_ZGU / mass_ZG[..., None]).astype(q_ZGH.dtype)
  return (o_ZGU, lse_ZG), (q_ZGH, k_YH, v_YU, position_Z, chunks, o_ZGU, lse_ZG)


def _backward(static, residuals, cotangents):
  S, R, L, scale = static
  q_ZGH, k_YH, v_YU, position_Z, chunks, o_ZGU, lse_ZG = residuals
  do_ZGU, dlse_ZG = cotangents
  blind_ZG = jnp.isneginf(lse_ZG)
  wide = lse_ZG.dtype
  mean_ZG = jnp.sum(do_ZGU.astype(wide) * o_ZGU.astype(wide), axis=-1)
  mean_ZG -= jnp.where(blind_ZG, 0, dlse_ZG)
  q_ZGH, do_ZGU, bad_ZG = nonfinite.hide_rows(q_ZGH, do_ZGU, lse_ZG)
  # of a bad row the probabilities of keys that it sees are infinity, and 0 times that is NaN
  finite_ZG = jnp.where(bad_ZG, -1e30, jnp.where(blind_ZG, 0, lse_ZG))

  def add_chunk(chunk, sums):
    dq_ZGH, dk_YH, dv_YU = sums
    row_R, place = chunks.rows_of(chunk, R)
    k_LH, v_LU = _block(k_YH, place, L), _block(v_YU, place, L)
    q_RGH, do_RGU = q_ZGH[row_R], do_ZGU[row_R]
    mask_RL = _mask(position_Z[row_R], place, S, L)
    p_RGL = jnp.exp(_logits(q_RGH, k_LH, mask_RL, scale) - finite_ZG[row_R][..., None])
    dp_RGL = _dot("rgu,lu->rgl", do_RGU, v_LU)
    da_RGL = p_RGL * (dp_RGL - mean_ZG[row_R][..., None])
    da_RGL = jnp.where(mask_RL[:, None], da_RGL, 0).astype(q_RGH.dtype)
    # a query that sees a NaN has NaN in da; others must not get it from 0 * NaN
    k_LH = jnp.where(jnp.isfinite(k_LH), k_LH, 0)
    dq_RGH = dq_ZGH[row_R] + scale * _dot("rgl,lh->rgh", da_RGL, k_LH)
    dk_LH = scale * _dot("rgl,rgh->lh", da_RGL, q_RGH)
    dv_LU = _dot("rgl,rgu->lu", p_RGL.astype(do_RGU.dtype), do_RGU)
    return (
      dq_ZGH.at[row_R].set(dq_RGH),
      _add_block(dk_YH, dk_LH, place),
      _add_block(dv_YU, dv_LU, place),
    )

  like = (q_ZGH, k_YH, v_YU, do_ZGU, chunks)
  start = tuple(zeros_varying_like(x.shape, wide, *like) for x in (q_ZGH, k_YH, v_YU))
  sums = jax.lax.fori_loop(0, chunks.chunks, add_chunk, start)
  return *(x.astype(q_ZGH.dtype) for x in sums), None, None


_attend.defvjp(_forward, _backward)


def _block(x_YH: jax.Array, place: jax.Array, L: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_YH, place, L)


def _add_block(x_YH: jax.Array, share_LH: jax.Array, place: jax.Array) -> jax.Array:
  old_LH = _block(x_YH, place, share_LH.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(x_YH, old_LH + share_LH, place, axis=0)


def _mask(position_R: jax.Array, place: jax.Array, S: int, L: int) -> jax.Array:
  """Returns bool [R, L]: whether a query sees the tokens of the block at `place`."""
  at_1L = place % S + jnp.arange(L, dtype=jnp.int32)[None]
  return at_1L <= position_R[:, None]


def _logits(q_RGH: jax.Array, k_LH: jax.Array, mask_RL: jax.Array, scale: float) -> jax.Array:
  a_RGL = scale * _dot("rgh,lh->rgl", q_RGH, k_LH)
  return jnp.where(mask_RL[:, None], a_RGL, -jnp.inf)


def _hide_nan(v_LU: jax.Array, mask_RL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the values with 0 for what is not finite, and NaN [R, U] for queries that see such.

  0 * NaN is NaN: without this a value would reach queries that do not see it.
  """
  finite_LU = jnp.isfinite(v_LU)
  dtype = jnp.promote_types(v_LU.dtype, jnp.float32)
  seen_RU = mask_RL.astype(dtype) @ (~finite_LU).astype(dtype)
  return jnp.where(finite_LU, v_LU, 0), jnp.where(seen_RU > 0, jnp.nan, 0)


def _finite(x: jax.Array) -> jax.Array:
  """Returns 0 for -inf, so that -inf - x is no NaN."""
  return jnp.where(jnp.isneginf(x), 0, x)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(spec, x, y, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST)
