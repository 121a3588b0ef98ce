"""Calls JAX's splash attention for TPU (`jax.experimental.pallas.ops.tpu.splash_attention`).

Its public function gives no gradient of the logsumexp. Where one is asked for, `_attend_with_lse`
calls the same kernels with that gradient in the mean that softmax's gradient subtracts.
"""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Options, Tokens
from pallas_kernels.common.platform import platform

LANES = 128  # blocks of queries and keys are multiples of this
BLOCKS = (512, 256, LANES)


def unsupported(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
) -> str | None:
  """Returns why the kernel cannot run this call, or None if it can."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  if platform() != "tpu" and not options.interpret:
    return f"needs a TPU, or interpret=True; this is {platform()}"
  if T != S:
    return f"T={T} queries and S={S} keys must be the same positions"
  if T % LANES:
    return f"T={T} must be a multiple of {LANES}"
  if not tokens.in_order:
    return "knows only positions 0 .. T - 1, so takes no q_positions_BT"
  if tokens.k_segment_ids_BS is not tokens.q_segment_ids_BT:
    return "k_segment_ids_BS of their own may leave a query without a key, which it averages over"
  if q_BTNH.dtype.name not in ("float32", "bfloat16"):
    return f"takes float32 or bfloat16, not {q_BTNH.dtype}"
  return None


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the output [B, T, N, U], and the logsumexp [B, T, N] if it is asked for."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  T, N = q_BTNH.shape[1:3]
  mask: masks.Mask
  if not options.causal:
    mask = masks.FullMask((T, T))
  elif options.window is None:
    mask = masks.CausalMask((T, T))
  else:
    mask = masks.LocalMask((T, T), (options.window - 1, 0), offset=0)
  block = next(size for size in BLOCKS if T % size == 0)
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
    attn_logits_soft_cap=options.cap,
    interpret=options.interpret,
  )
  ids_BT = tokens.q_segment_ids_BT
  segments = None if ids_BT is None else kernel.SegmentIds(q=ids_BT, kv=ids_BT)
  if return_lse:
    attend_heads = functools.partial(_attend_with_lse, attend_heads)
  q_BNTH = (q_BTNH * options.scale).swapaxes(1, 2)
  returned = jax.vmap(attend_heads)(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKU.swapaxes(1, 2), segments)
  o_BNTU, lse_BNT = returned if return_lse else (returned, None)
  o_BTNU = o_BNTU.swapaxes(1, 2).astype(q_BTNH.dtype)
  return o_BTNU, None if lse_BNT is None else lse_BNT.swapaxes(1, 2)


@jax.custom_vjp
def _attend_with_lse(
  attend_heads: Any, q_NTH: jax.Array, k_KTH: jax.Array, v_KTU: jax.Array, segments: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns output [N, T, U] and logsumexp [N, T] of the library's `attend_heads`."""
  return _forward(attend_heads, q_NTH, k_KTH, v_KTU, segments)[0]


def _forward(attend_heads, q_NTH, k_KTH, v_KTU, segments):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

  arrays = (attend_heads.fwd_mask_info, q_NTH, k_KTH, v_KTU, segments)
  options = attend_heads.kwargs | {"save_residuals": True}
  o_NTU, (lse_NT,) = kernel._splash_attention_forward(*arrays, sinks=None, **options)
  return (o_NTU, lse_NT), (attend_heads, q_NTH, k_KTH, v_KTU, segments, o_NTU, lse_NT)


def _backward(residuals, cotangents):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

  attend_heads, q_NTH, k_KTH, v_KTU, segments, o_NTU, lse_NT = residuals
  do_NTU, dlse_NT = cotangents
  mean_NT = jnp.sum(o_NTU.astype(jnp.float32) * do_NTU.astype(jnp.float32), axis=-1) - dlse_NT
  names = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function", "interpret")
  options = {name: attend_heads.kwargs[name] for name in names}
  blocks = attend_heads.kwargs["block_sizes"]
  options |= {name: getattr(blocks, name) for name in ("q_layout", "k_layout", "v_layout")}
  arrays = (q_NTH, k_KTH, v_KTU, segments, None, lse_NT, do_NTU, mean_NT)
  dq_NTH = kernel._splash_attention_bwd_dq(
    *arrays,
    bq=blocks.block_q_dq,
    bkv=blocks.block_kv_dq,
    mask_info=attend_heads.dq_mask_info,
    **options,
  )
  _, dk_KTH, dv_KTU = kernel._splash_attention_bwd_dkv(
    *arrays,
    bq=blocks.block_q_dkv,
    bkv=blocks.block_kv_dkv,
    bkv_compute=blocks.block_kv_dkv_compute,
    mask_info=attend_heads.dkv_mask_info,
    use_fused_bwd_kernel=False,
    **options,
  )
  return None, dq_NTH, dk_KTH, dv_KTU, None


_attend_with_lse.defvjp(_forward, _backward)
