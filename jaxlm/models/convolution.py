"""Convolves each channel with its last few inputs, as recurrent mixers do with q, k and v."""

# B batch, T positions, C channels, W taps, P = W - 1 inputs before the first position

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check_shape


def short_convolution(
  x_BTC: jax.Array,
  w_WC: jax.Array,
  segment_ids_BT: jax.Array | None = None,
  before_BPC: jax.Array | None = None,
) -> jax.Array:
  """Returns y[t] = sum_j w[W - 1 - j] x[t - j] for every channel, float32 [B, T, C].

  Inputs before the first position are `before_BPC`, or zeros. With segment ids [B or 1, T], each
  segment in one piece, those of another segment count as zeros.
  """
  check_shape("x_BTC", x_BTC, (None, None, None))
  check_shape("w_WC", w_WC, (None, x_BTC.shape[2]))
  W, T = w_WC.shape[0], x_BTC.shape[1]
  past = ((0, 0), (W - 1, 0))
  if before_BPC is None:
    padded_BSC = jnp.pad(x_BTC, (*past, (0, 0)))
  else:
    padded_BSC = jnp.concatenate((before_BPC.astype(x_BTC.dtype), x_BTC), axis=1)
  y_BTC = jnp.zeros((), jnp.float32)
  for tap in range(W):
    shifted_BTC = padded_BSC[:, tap : tap + T].astype(jnp.float32)
    if segment_ids_BT is not None and tap < W - 1:
      ids_BS = jnp.pad(segment_ids_BT, past, mode="edge")
      same_BT = ids_BS[:, tap : tap + T] == segment_ids_BT
      shifted_BTC = jnp.where(same_BT[..., None], shifted_BTC, 0)
    y_BTC = y_BTC + shifted_BTC * w_WC[tap].astype(jnp.float32)[None, None]
  return y_BTC
