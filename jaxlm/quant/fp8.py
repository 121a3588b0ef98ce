"""Rounds to 8-bit floats with a scale for a tensor, row, group or block (2412.19437, section 3.3).

Codes and scales are those of `pallas_kernels.fp8_matmul`, to the bit.
"""

# Z any leading axes, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import Fp8Format
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded, expand, split
from pallas_kernels.fp8_matmul import codes


def quantize(x_ZD: jax.Array, format: Fp8Format) -> jax.Array:
  """Returns the nearest values in x's dtype, with all of the gradient (straight through)."""
  encoded = encode(jax.lax.stop_gradient(x_ZD), format)
  return straight_through(x_ZD, decode(encoded, format), None)


def encode(x_ZD: jax.Array, format: Fp8Format) -> Encoded:
  """Returns the codes' bits and float32 scales: the largest magnitude over the largest code."""
  form = codes.FORMATS[format.elements]
  x_split, axes = split(x_ZD.astype(jnp.float32), format.shared, format.size)
  largest = codes.largest_magnitude(x_split, axes)
  scale = codes.scale_of_block(largest, form.largest, "f32")
  bits = jax.lax.bitcast_convert_type(codes.encode(x_split, expand(scale, axes), form), jnp.uint8)
  return Encoded(bits.reshape(x_ZD.shape).astype(jnp.int32), scale)


def decode(encoded: Encoded, format: Fp8Format) -> jax.Array:
  """Returns the float32 values that bits and scales stand for."""
  bits_split, axes = split(encoded.codes, format.shared, format.size)
  dtype = codes.FORMATS[format.elements].dtype
  values_split = jax.lax.bitcast_convert_type(bits_split.astype(jnp.uint8), dtype)
  values_split = values_split.astype(jnp.float32) * expand(encoded.scale, axes)
  return values_split.reshape(encoded.codes.shape)
