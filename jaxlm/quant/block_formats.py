"""Rounds to narrow floats with shared scales: OCP Microscaling v1.0 (MXFP4, 6, 8) and NVFP4."""

# Z any leading axes, D contracted axis

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config.formats import BlockFormat
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded, expand, split
from pallas_kernels.common.errors import UserError


class Element(NamedTuple):
  """Describes a float of few bits: sign, exponent, mantissa, without infinities in use."""

  mantissa: int
  """bits"""
  least_exponent: int
  """of normal numbers"""
  largest: float
  bits: int


E2M1 = Element(1, 0, 6.0, 4)
E4M3 = Element(3, -6, 448.0, 8)
ELEMENTS = {
  "mxfp4": E2M1,
  "nvfp4": E2M1,
  "mxfp6_e2m3": Element(3, 0, 7.5, 6),
  "mxfp6_e3m2": Element(2, -2, 28.0, 6),
  "mxfp8_e4m3": E4M3,
  "mxfp8_e5m2": Element(2, -14, 57344.0, 8),
}
_ROOM = {"mx": 3 / 4, "nvfp4": 16 / 17}
"""Factors after which no value of a block lies beyond the largest element, for random rounding."""


def quantize(x_ZD: jax.Array, format: BlockFormat, key: jax.Array | None = None) -> jax.Array:
  """Returns the nearest values in x's dtype, with all of the gradient (straight through).

  A stochastic format rounds by `key`, without bias; it raises UserError where there is none.
  """
  encoded = encode(jax.lax.stop_gradient(x_ZD), format, key)
  return straight_through(x_ZD, decode(encoded, format), None)


def encode(x_ZD: jax.Array, format: BlockFormat, key: jax.Array | None = None) -> Encoded:
  """Returns the elements' bits, sign first, and float32 scales: powers of two, or e4m3 values."""
  x_split, axes = split(x_ZD.astype(jnp.float32), format.shared, format.size)
  largest = jnp.max(jnp.abs(x_split), axis=axes)
  scale, tensor_scale = _scales(largest, format)
  whole = scale if tensor_scale is None else scale * tensor_scale
  v_split = x_split / expand(whole, axes)
  noise = None
  if format.stochastic:
    if key is None:
      rule = "rounds at random, which needs the key of a training step"
      raise UserError(f"format={format}: {rule}: it is for gradients, and `apply` takes key=")
    v_split = v_split * _room(format)
    noise = jax.random.uniform(key, x_ZD.shape).reshape(v_split.shape)
  bits_split = to_bits(v_split, ELEMENTS[format.elements], noise)
  return Encoded(bits_split.reshape(x_ZD.shape), scale, None, tensor_scale)


def decode(encoded: Encoded, format: BlockFormat) -> jax.Array:
  """Returns the float32 values that bits and scales stand for."""
  bits_split, axes = split(encoded.codes, format.shared, format.size)
  scale = encoded.scale
  if encoded.tensor_scale is not None:
    scale = scale * encoded.tensor_scale
  if format.stochastic:
    scale = scale / _room(format)
  values = from_bits(bits_split, ELEMENTS[format.elements]) * expand(scale, axes)
  return values.reshape(encoded.codes.shape)


def _room(format: BlockFormat) -> float:
  return _ROOM["nvfp4" if format.elements == "nvfp4" else "mx"]


def _scales(largest: jax.Array, format: BlockFormat) -> tuple[jax.Array, jax.Array | None]:
  """Returns the scale of each block, of which the largest magnitude is given, and the tensor's.

  mx: 2^(floor(log2 largest) - exponent of the largest element), or with `ceil_scale` the smallest
  power of two that clips nothing. nvfp4: e4m3 from 2^-6 to 448. Blocks of zeros have the least.
  """
  element = ELEMENTS[format.elements]
  if format.elements == "nvfp4":
    whole = jnp.max(largest)
    tensor = jnp.where(whole > 0, whole / (E4M3.largest * E2M1.largest), 1.0)
    scale = largest / (E2M1.largest * tensor)
    rounded = from_bits(to_bits(scale, E4M3), E4M3)
    return jnp.clip(rounded, 2.0**E4M3.least_exponent, E4M3.largest), tensor
  if format.ceil_scale:
    mantissa, exponent = jnp.frexp(largest / element.largest)
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
  else:
    exponent = _exponent(largest) - _exponent(jnp.float32(element.largest))
  return _power(jnp.clip(exponent, -126, 127)), None


def _exponent(x: jax.Array) -> jax.Array:
  """Returns floor(log2 |x|), exactly, for normal float32 numbers; -127 for smaller ones."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return ((bits >> 23) & 255) - 127


def _power(exponent: jax.Array) -> jax.Array:
  """Returns 2^exponent, exactly, for exponents of normal float32 numbers."""
  return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def to_bits(v: jax.Array, element: Element, noise: jax.Array | None = None) -> jax.Array:
  """Returns the bits, int32, of the nearest element, half to even, at most the largest.

  With `noise`, uniform in [0, 1), it rounds up with the probability that makes the mean v.
  """
  size = jnp.abs(v)
  exponent = jnp.maximum(_exponent(size), element.least_exponent)
  unit = _power(exponent - element.mantissa)
  steps = jnp.round(size / unit) if noise is None else jnp.floor(size / unit + noise)
  size = jnp.minimum(steps * unit, element.largest)
  exponent = jnp.maximum(_exponent(size), element.least_exponent)
  unit = _power(exponent - element.mantissa)
  # a normal number's leading bit, 2^mantissa units, raises the exponent field from 0 to 1
  code = ((exponent - element.least_exponent) << element.mantissa) + (size / unit).astype(jnp.int32)
  return jnp.where(v < 0, code + 2 ** (element.bits - 1), code)


def from_bits(bits: jax.Array, element: Element) -> jax.Array:
  """Returns the float32 values of elements."""
  code = bits & (2 ** (element.bits - 1) - 1)
  field, fraction = code >> element.mantissa, code & (2**element.mantissa - 1)
  exponent = element.least_exponent + jnp.maximum(field, 1) - 1 - element.mantissa
  steps = jnp.where(field > 0, fraction + 2**element.mantissa, fraction)
  size = steps.astype(jnp.float32) * _power(exponent)
  return jnp.where(bits >= 2 ** (element.bits - 1), -size, size)
