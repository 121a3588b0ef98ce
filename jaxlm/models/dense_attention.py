"""Causal softmax attention of arrays: a readable reference, and the platforms' fused kernels.

All take q [B, T, N, H], k and v [B, T, K, H] with N a multiple of K, return [B, T, N, H] in q's dtype, scale by
H^-1/2 and keep logits and softmax in float32. `window` limits a query to that many keys, itself included;
`segment_ids` [B, T] int32 keeps queries to keys of their own segment; `cap` bends the logits before the mask.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K, H head width

import jax
import jax.numpy as jnp

from pallas_kernels.common.errors import UnsupportedError

MASKED = -1e30  # finite, so that a row without any key gives no NaN


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """c tanh(x / c), within (-c, c); x itself without a cap (Gemma 2, arXiv 2408.00118, section 2)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BTS: jax.Array,
  cap: float | None = None,
) -> jax.Array:
  """Attention under any mask (bool [B or 1, T, S], true where allowed)."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
  a_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  a_BKGTS = jnp.where(mask_BTS[:, None, None], soft_cap(a_BKGTS, cap), MASKED)
  p_BKGTS = jax.nn.softmax(a_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH).reshape(B, T, N, H)


def causal_mask(t_BT: jax.Array, s_BS: jax.Array, window: int | None) -> jax.Array:
  """bool [B, T, S]: key position s is not after t, and within the window."""
  distance_BTS = t_BT[:, :, None] - s_BS[:, None, :]
  mask_BTS = distance_BTS >= 0
  return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


def reference(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None, window=None, cap=None) -> jax.Array:
  """Materialises the whole [T, S] mask."""
  t_BT = jnp.arange(q_BTNH.shape[1])[None]
  mask_BTS = causal_mask(t_BT, t_BT, window)
  if segment_ids_BT is not None:
    mask_BTS = mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
  return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap)


def cudnn(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None, window=None, cap=None) -> jax.Array:
  """cuDNN's fused attention, through `jax.nn.dot_product_attention` (float16 or bfloat16 only)."""
  if cap is not None:
    raise UnsupportedError(f"cudnn attention: has no soft cap of the logits (attention_cap={cap})")
  mask_BNTS = None
  if segment_ids_BT is not None:
    mask_BNTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
  left = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=mask_BNTS,
    is_causal=True,
    local_window_size=left,
    implementation="cudnn",
  )


def splash(
  q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None, window=None, cap=None, interpret=False
) -> jax.Array:
  """JAX's splash attention for TPU; T must be a multiple of 128."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  T, N, H = q_BTNH.shape[1:]
  if T % 128:
    raise UnsupportedError(f"splash attention: T={T} must be a multiple of 128")
  mask = (
    masks.CausalMask((T, T))
    if window is None
    else masks.LocalMask((T, T), (window - 1, 0), offset=0)
  )
  block = next(size for size in (512, 256, 128) if T % size == 0)
  attend_heads = kernel.make_splash_mha_single_device(
    masks.MultiHeadMask([mask] * N),
    block_sizes=kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
  segments = (
    None if segment_ids_BT is None else kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
  )
  q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
  return (
    jax.vmap(attend_heads)(q_BNTH, k_BKSH, v_BKSH, segments).swapaxes(1, 2).astype(q_BTNH.dtype)
  )
