"""Calls cuDNN's fused attention for GPU, through `jax.nn.dot_product_attention`."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries, keys and values
from __future__ import annotations

import importlib.util

import jax

from pallas_kernels.attention.mask import Options, Tokens, visible
from pallas_kernels.common.platform import platform

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def unsupported(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
) -> str | None:
  """Returns why the kernel cannot run this call, or None if it can."""
  T, S, H, U = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3], v_BSKU.shape[3]
  segments_BT = tokens.q_segment_ids_BT
  if platform() != "gpu":
    return f"needs a GPU; this is {platform()}"
  if options.interpret:
    return f"interpret={options.interpret!r}: cuDNN has no interpreter"
  if not has_cudnn():
    return "needs cuDNN, which comes with jax's CUDA plugin"
  if q_BTNH.dtype.name not in ("bfloat16", "float16"):
    return f"takes bfloat16 or float16, not {q_BTNH.dtype}"
  if options.cap is not None:
    return f"has no soft cap, cap={options.cap}"
  if return_lse:
    return "gives no gradient through the logsumexp, return_lse=True"
  if not tokens.in_order:
    return "knows only positions 0 .. T - 1, so takes no q_positions_BT"
  if options.causal and T != S:
    return f"T={T} queries and S={S} keys must be the same positions"
  if H != U:
    return f"H={H} and U={U} must be equal"
  if H % 8 or H > widest_head():
    return f"H={H} must be a multiple of 8, at most {widest_head()} on this GPU"
  if segments_BT is None:
    return None
  if options.window is not None:
    return f"has no segments under a window, window={options.window}"
  if tokens.k_segment_ids_BS is not segments_BT:
    return "k_segment_ids_BS of their own may leave a query without a key, which it averages over"
  return f"T={T} must be even where there are segments" if T % 2 else None


def has_cudnn() -> bool:
  """Tells whether jax's CUDA plugin, which brings cuDNN, is installed."""
  return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def widest_head() -> int:
  """Returns the largest H: 256 from Hopper on, 128 before and where the GPU is not there to ask."""
  if jax.default_backend() != "gpu":
    return 128
  major = int(jax.local_devices()[0].compute_capability.split(".")[0])
  return 256 if major >= 9 else 128


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
) -> tuple[jax.Array, None]:
  """Returns the output [B, T, N, H]. Segments become a mask of [B, 1, T, S] numbers."""
  mask_BTS = visible(tokens, Options(causal=False, window=None, cap=None, scale=1.0))
  o_BTNH = jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=None if mask_BTS is None else mask_BTS[:, None],
    scale=options.scale,
    is_causal=options.causal,
    local_window_size=None if options.window is None else (options.window - 1, 0),
    implementation="cudnn",
  )
  return o_BTNH, None
