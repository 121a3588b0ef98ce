"""Rounds to equally spaced levels: symmetric or affine with a level at zero, or mid-rise.

Scales are computed in float32 over the last axis, which is the one that is contracted; see
`jaxlm.quant.groups` for what shares one. A row of zeros has the scale 0 and stays zero.
"""

# Z any leading axes, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import UniformFormat
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded, expand, safe, split


def quantize(x_ZD: jax.Array, format: UniformFormat) -> jax.Array:
  """Returns the nearest levels in x's shape and dtype, with the straight-through gradient.

  Under `clips_gradient` values beyond the outer levels get no gradient.
  """
  x32_ZD = jax.lax.stop_gradient(x_ZD).astype(jnp.float32)
  encoded = encode(x32_ZD, format)
  mask = _is_inside(x32_ZD, encoded, format) if format.clips_gradient else None
  return straight_through(x_ZD, decode(encoded, format), mask)


def encode(x_ZD: jax.Array, format: UniformFormat) -> Encoded:
  """Returns codes and scales; symmetric codes are signed, affine ones count from 0.

  Mid-rise codes k stand for (k - 1/2) steps and run from 1 - 2^(bits-1) to 2^(bits-1).
  """
  x_split, axes = split(x_ZD.astype(jnp.float32), format.shared, format.size)
  bits = format.bits
  zero = None
  if format.grid == "affine":
    low, high = (format.ratio * f(x_split, axis=axes) for f in (jnp.min, jnp.max))
    scale = _rounded(safe((high - low) / (2**bits - 1)), format)
    zero = -low / scale
  else:
    bound = format.ratio * jnp.max(jnp.abs(x_split), axis=axes)
    steps = 2 ** (bits - 1) - 1 if format.grid == "symmetric" else (2**bits - 1) / 2
    scale = _rounded(bound / (steps + 0.5 * format.avoids_ties), format)
  v_split = x_split / expand(safe(scale), axes)
  lowest, highest = code_range(format)
  if zero is not None:
    v_split = v_split + expand(zero, axes)
  elif format.grid == "midrise":
    v_split = v_split + 0.5
  codes = jnp.clip(jnp.round(v_split), lowest, highest).astype(jnp.int32)
  return Encoded(codes.reshape(x_ZD.shape), scale, zero)


def decode(encoded: Encoded, format: UniformFormat) -> jax.Array:
  """Returns the float32 values that codes and scales stand for."""
  codes_split, axes = split(encoded.codes, format.shared, format.size)
  v_split = codes_split.astype(jnp.float32)
  if encoded.zero is not None:
    v_split = v_split - expand(encoded.zero, axes)
  elif format.grid == "midrise":
    v_split = v_split - 0.5
  return (v_split * expand(encoded.scale, axes)).reshape(encoded.codes.shape)


def code_range(format: UniformFormat) -> tuple[int, int]:
  """Returns the smallest and the largest code."""
  half = 2 ** (format.bits - 1)
  if format.grid == "affine":
    return 0, 2 * half - 1
  return (-half, half - 1) if format.grid == "symmetric" else (1 - half, half)


def _rounded(scale: jax.Array, format: UniformFormat) -> jax.Array:
  """Returns float32 scales that the format's type of scales can hold."""
  return scale.astype(format.scale_dtype).astype(jnp.float32)


def _is_inside(x_ZD: jax.Array, encoded: Encoded, format: UniformFormat) -> jax.Array:
  """Tells which values lie between the outer levels."""
  ends = [
    decode(encoded._replace(codes=jnp.full_like(encoded.codes, code)), format)
    for code in code_range(format)
  ]
  return (ends[0] <= x_ZD) & (x_ZD <= ends[1])
