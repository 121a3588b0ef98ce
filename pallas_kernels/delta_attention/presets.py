"""Names the linear attentions of the literature that are cases of `delta_attention`.

Each takes further keyword arguments of `delta_attention` (segments, states, implementation).
"""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.api import delta_attention


def kimi_delta_attention(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTNV: jax.Array,
  decay_BTNK: jax.Array,
  beta_BTN: jax.Array,
  *,
  l2norm: bool = True,
  **options: Any,
) -> Any:
  """Returns S = (I - beta k k^T) Diag(exp(g)) S + beta k v^T, read by q (KDA).

  Source: Kimi Linear, arXiv 2510.26692, equation 1.
  """
  gates: Any = dict(decay=decay_BTNK, erase=beta_BTN, write=beta_BTN)
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, l2norm=l2norm, **gates, **options)


def gated_delta_rule(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTNV: jax.Array,
  decay_BTN: jax.Array,
  beta_BTN: jax.Array,
  *,
  l2norm: bool = True,
  **options: Any,
) -> Any:
  """Returns S = exp(g) (I - beta k k^T) S + beta k v^T, read by q, with one g for a head.

  Source: Gated DeltaNet, arXiv 2412.06464, equation 10.
  """
  gates: Any = dict(decay=decay_BTN, erase=beta_BTN, write=beta_BTN)
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, l2norm=l2norm, **gates, **options)


def delta_net(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTNV: jax.Array,
  beta_BTN: jax.Array,
  *,
  l2norm: bool = True,
  **options: Any,
) -> Any:
  """Returns S = (I - beta k k^T) S + beta k v^T, read by q.

  Source: DeltaNet, arXiv 2406.06484, section 2.2.
  """
  gates: Any = dict(erase=beta_BTN, write=beta_BTN)
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, l2norm=l2norm, **gates, **options)


def gated_delta_rule_2(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTNV: jax.Array,
  decay_BTNK: jax.Array,
  erase_BTNK: jax.Array,
  write_BTNV: jax.Array,
  *,
  l2norm: bool = True,
  **options: Any,
) -> Any:
  """Returns S = (I - k (b k)^T) Diag(exp(g)) S + k (w v)^T, read by q; b and w for each channel.

  Source: Gated DeltaNet-2, arXiv 2605.22791.
  """
  gates: Any = dict(decay=decay_BTNK, erase=erase_BTNK, write=write_BTNV)
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, l2norm=l2norm, **gates, **options)


def gated_linear_attention(
  q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTNV: jax.Array, decay_BTNK: jax.Array, **options: Any
) -> Any:
  """Returns S = Diag(exp(g)) S + k v^T, read by q.

  Source: GLA, arXiv 2312.06635, equation 3.
  """
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, decay=decay_BTNK, **options)


def lightning_attention(
  q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTNV: jax.Array, slope_N: jax.Array, **options: Any
) -> Any:
  """Returns S = exp(-slope) S + k v^T, read by q, unscaled, with a fixed slope of each head.

  Source: Lightning attention, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313.
  """
  decay_BTN = jnp.broadcast_to(-jnp.asarray(slope_N), v_BTNV.shape[:3])
  return delta_attention(q_BTHK, k_BTHK, v_BTNV, decay=decay_BTN, scale=1.0, **options)
