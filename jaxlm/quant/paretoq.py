"""Trains weights of 1 to 4 bits, each with levels of its own (Liu et al. 2025, arXiv 2502.02631).

1 bit: elastic binary. Ternary and 2 bits: SEQ, levels that straddle zero evenly. 3 and 4 bits: LSQ.
Every row of a weight has a learned scale.
"""

# Z output channels, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import LsqFormat, ParetoqFormat
from jaxlm.quant import lsq
from jaxlm.quant.gradients import with_scale_gradient
from jaxlm.quant.groups import Encoded, learned

LEAST_SCALE = 1e-5
_EDGE = 0.99
"""clips to below 1, so that an end point does not round to a level more"""
_SEQ = {"ternary": (1.5, 0.0), "2": (2.0, 0.5)}
"""levels within one scale, and their shift from zero"""


def quantize(w_ZD: jax.Array, format: ParetoqFormat, N: int, *, scale: jax.Array) -> jax.Array:
  """Returns the levels nearest to the weights in w's dtype; N counts the weights of the matrix.

  w gets the gradient within the levels' range, the scale [Z] its own, times 1 / sqrt(N), and with
  3 and 4 bits 1 / sqrt(N Qp). A weight of exactly 0 counts as positive in binary.
  """
  if format.bits in ("3", "4"):
    return lsq.quantize(w_ZD, _lsq(format), N, step=scale, least=LEAST_SCALE)
  a = learned(scale, w_ZD, LEAST_SCALE)
  v_ZD = jax.lax.stop_gradient(w_ZD).astype(jnp.float32) / a
  level_ZD = _levels(_codes(v_ZD, format), format)
  if format.bits == "1":
    inside_ZD, slope_ZD = jnp.abs(v_ZD) <= 1, level_ZD
  else:
    inside_ZD = jnp.abs(v_ZD) <= _EDGE
    n, shift = _SEQ[format.bits]
    end = 1.0 if format.repo_compat and format.bits == "ternary" else (1 + shift) / n
    slope_ZD = jnp.where(inside_ZD, level_ZD - v_ZD, end * jnp.sign(v_ZD))
  return with_scale_gradient(w_ZD, scale, a * level_ZD, inside_ZD, slope_ZD, float(N) ** -0.5)


def encode(w_ZD: jax.Array, format: ParetoqFormat, *, scale: jax.Array) -> Encoded:
  """Returns signed codes (-1 and 0 in binary) and the scales."""
  scale = jnp.maximum(scale, LEAST_SCALE)
  if format.bits in ("3", "4"):
    return lsq.encode(w_ZD, _lsq(format), step=scale)
  v_ZD = w_ZD.astype(jnp.float32) / scale[:, None]
  return Encoded(_codes(v_ZD, format).astype(jnp.int32), scale)


def decode(encoded: Encoded, format: ParetoqFormat) -> jax.Array:
  """Returns the float32 values that codes and scales stand for."""
  if format.bits in ("3", "4"):
    return lsq.decode(encoded, _lsq(format))
  return _levels(encoded.codes.astype(jnp.float32), format) * encoded.scale[:, None]


def init_scales(w_ZD: jax.Array, format: ParetoqFormat) -> dict[str, jax.Array]:
  """Returns the first scales [Z]: the mean magnitude in binary, else the largest level fits."""
  size_ZD = jnp.abs(w_ZD.astype(jnp.float32))
  if format.bits == "1":
    return {"scale": jnp.mean(size_ZD, axis=-1)}
  steps = lsq.code_range(_lsq(format))[1] if format.bits in ("3", "4") else 1
  return {"scale": jnp.max(size_ZD, axis=-1) / steps}


def _lsq(format: ParetoqFormat) -> LsqFormat:
  return LsqFormat(bits=int(format.bits), shared="row")


def _codes(v_ZD: jax.Array, format: ParetoqFormat) -> jax.Array:
  """Returns float codes of weights over their scales."""
  if format.bits == "1":
    return jnp.where(v_ZD >= 0, 0.0, -1.0)
  n, shift = _SEQ[format.bits]
  return jnp.round(jnp.clip(v_ZD, -_EDGE, _EDGE) * n - shift)


def _levels(codes_ZD: jax.Array, format: ParetoqFormat) -> jax.Array:
  """Returns what codes stand for, in units of the scale."""
  if format.bits == "1":
    return 2 * codes_ZD + 1
  n, shift = _SEQ[format.bits]
  return (codes_ZD + shift) / n
