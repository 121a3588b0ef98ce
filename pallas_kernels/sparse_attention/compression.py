"""Compresses blocks of keys or values to one each: their mean, a linear form, an MLP.

Source: arXiv 2502.11089, equation 7; the linear form as in XunhaoLai/native-sparse-attention.
"""

# B batch, S key positions, K key heads, H width, L tokens of a block, C compressed blocks,
# F hidden width, Z width of a compressed block
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_shape
from pallas_kernels.sparse_attention.places import segment_firsts


def block_starts(
  S: int, *, length: int, stride: int, segment_ids_BS: jax.Array | None = None
) -> jax.Array:
  """Returns the first token of each compressed block, int32 [B or 1, C], and S for no block.

  C is max(0, (S - length) // stride + 1), with segments too: each segment has the blocks that it
  would have alone, one segment after another, and together these are never more.
  """
  C = max(0, (S - length) // stride + 1)
  if segment_ids_BS is None:
    return jnp.arange(C, dtype=jnp.int32)[None] * stride
  check_shape("segment_ids_BS", segment_ids_BS, (None, S))
  at_1S = jnp.arange(S, dtype=jnp.int32)[None]
  last_1S = jnp.minimum(at_1S + length - 1, S - 1)
  whole_BS = segment_ids_BS == segment_ids_BS[:, last_1S[0]]
  whole_BS &= at_1S + length <= S
  starts_BS = whole_BS & ((at_1S - segment_firsts(segment_ids_BS)) % stride == 0)
  # the first C of the places that are starts, in order
  return jnp.sort(jnp.where(starts_BS, at_1S, S), axis=1)[:, :C]


def compress_mean(x_BSKH: jax.Array, starts_BC: jax.Array, *, length: int) -> jax.Array:
  """Returns the mean of each block, [B, C, K, H]; sums are float32 or wider."""
  x_BCLKH = gather_blocks(x_BSKH, starts_BC, length)
  dtype = jnp.promote_types(x_BSKH.dtype, jnp.float32)
  return jnp.mean(x_BCLKH, axis=2, dtype=dtype).astype(x_BSKH.dtype)


def compress_linear(
  x_BSKH: jax.Array,
  starts_BC: jax.Array,
  weight_KLHZ: jax.Array,
  position_KLH: jax.Array | None = None,
) -> jax.Array:
  """Returns sum_L W_L (x + position) of each block, with weights of each key head, [B, C, K, Z]."""
  x_BCLKH = _with_positions(x_BSKH, starts_BC, weight_KLHZ, position_KLH)
  return _dot("bclkh,klhz->bckz", x_BCLKH, weight_KLHZ)


def compress_mlp(
  x_BSKH: jax.Array,
  starts_BC: jax.Array,
  up_KLHF: jax.Array,
  down_KFZ: jax.Array,
  position_KLH: jax.Array | None = None,
  *,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
) -> jax.Array:
  """Returns down(activation(up(x + position))) of each block as one vector, [B, C, K, Z]."""
  x_BCLKH = _with_positions(x_BSKH, starts_BC, up_KLHF, position_KLH)
  hidden_BCKF = activation(_dot("bclkh,klhf->bckf", x_BCLKH, up_KLHF))
  K, F = hidden_BCKF.shape[2:]
  check_shape("down_KFZ", down_KFZ, (K, F, None))
  return _dot("bckf,kfz->bckz", hidden_BCKF, down_KFZ)


def gather_blocks(x_BSKH: jax.Array, starts_BC: jax.Array, length: int) -> jax.Array:
  """Returns the tokens of each block, [B, C, L, K, H]; zeros where there is no block."""
  B, S = x_BSKH.shape[:2]
  check(starts_BC.shape[0] in (1, B), "starts_BC.shape", starts_BC.shape, f"needs 1 or {B} rows")
  at_BCL = starts_BC[:, :, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
  take = jax.vmap(
    lambda x_SKH, at_CL: x_SKH.at[at_CL].get(mode="fill", fill_value=0),
    in_axes=(0, None if starts_BC.shape[0] == 1 else 0),
  )
  exists_BC = (starts_BC < S)[:, :, None, None, None]
  x_BCLKH = take(x_BSKH, at_BCL[0] if starts_BC.shape[0] == 1 else at_BCL)
  return jnp.where(exists_BC, x_BCLKH, jnp.zeros_like(x_BCLKH))


def _with_positions(
  x_BSKH: jax.Array,
  starts_BC: jax.Array,
  weight_KLHZ: jax.Array,
  position_KLH: jax.Array | None,
) -> jax.Array:
  """Returns the tokens of each block with what marks their place in it, [B, C, L, K, H]."""
  K, H = x_BSKH.shape[2:]
  check_shape("weight_KLHZ", weight_KLHZ, (K, None, H, None))
  L = weight_KLHZ.shape[1]
  x_BCLKH = gather_blocks(x_BSKH, starts_BC, L)
  if position_KLH is None:
    return x_BCLKH
  check_shape("position_KLH", position_KLH, (K, L, H))
  return x_BCLKH + position_KLH.swapaxes(0, 1).astype(x_BCLKH.dtype)[None, None]


def _dot(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  out = jnp.einsum(spec, x, weight.astype(x.dtype), preferred_element_type=dtype)
  return out.astype(x.dtype)
