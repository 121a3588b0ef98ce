"""Attends with all T x S logits in memory; every other implementation is compared with it."""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Options, Tokens, soft_cap, visible, with_positions


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, tokens: Tokens, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, U] and the logsumexp of the logits [B, T, N].

  Everything is float32, or float64 for float64 inputs, also where the inputs are narrower.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.astype(dtype).reshape(B, T, K, N // K, H)
  a_BKGTS = options.scale * _dot("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.astype(dtype))
  a_BKGTS = soft_cap(a_BKGTS, options.cap)
  mask_BTS = visible(with_positions(tokens, T, S), options)
  if mask_BTS is not None:
    a_BKGTS = jnp.where(mask_BTS[:, None, None], a_BKGTS, -jnp.inf)
  max_BKGT1 = jax.lax.stop_gradient(jnp.max(a_BKGTS, axis=-1, keepdims=True))
  max_BKGT1 = jnp.where(jnp.isneginf(max_BKGT1), 0, max_BKGT1)  # of a row that sees no key
  e_BKGTS = jnp.exp(a_BKGTS - max_BKGT1)
  mass_BKGT1 = jnp.sum(e_BKGTS, axis=-1, keepdims=True)
  blind_BKGT1 = mass_BKGT1 == 0
  mass_BKGT1 = jnp.where(blind_BKGT1, 1, mass_BKGT1)
  o_BTKGU = _dot("bkgts,bsku->btkgu", e_BKGTS / mass_BKGT1, v_BSKU.astype(dtype))
  lse_BKGT1 = jnp.where(blind_BKGT1, -jnp.inf, max_BKGT1 + jnp.log(mass_BKGT1))
  lse_BTN = lse_BKGT1.reshape(B, N, T).swapaxes(1, 2)
  return o_BTKGU.reshape(B, T, N, v_BSKU.shape[-1]).astype(q_BTNH.dtype), lse_BTN


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)
