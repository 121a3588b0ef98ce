"""JAX's splash attention for TPU (`jax.experimental.pallas.ops.tpu.splash_attention`)."""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values
from __future__ import annotations

import jax

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
  return "has no gradient of the logsumexp, return_lse=True" if return_lse else None


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, tokens: Tokens, options: Options
) -> tuple[jax.Array, None]:
  """Returns the output [B, T, N, U]."""
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
  q_BNTH = (q_BTNH * options.scale).swapaxes(1, 2)
  o_BNTU = jax.vmap(attend_heads)(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKU.swapaxes(1, 2), segments)
  return o_BNTU.swapaxes(1, 2).astype(q_BTNH.dtype), None
