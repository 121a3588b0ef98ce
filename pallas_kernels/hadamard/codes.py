"""Turns rotated numbers into codes and scales; every implementation, kernels too, calls this."""

# R rows, W width, G groups of a row
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.codes import FORMATS as EIGHT_BITS
from pallas_kernels.fp8_matmul.codes import Format, largest_magnitude, scale_of_block

FormatName = Literal["int8", "int4", "e4m3fn", "e5m2", "mxfp4"]
ScaleRule = Literal["absmax", "quest"]
FORMATS: dict[str, Format] = {
  **EIGHT_BITS,
  "int4": Format(jnp.int4, 7.0),
  "mxfp4": Format(jnp.float4_e2m1fn, 6.0),
}
QUEST_BITS = {"int4": 4, "int8": 8}
QUEST_CLIP = {4: 2.514005, 8: 3.922205}
"""Clip in units of the RMS that minimises the error of a mid-rise grid on N(0, 1)
(arXiv 2502.05003, section 3.2)."""

ROUNDER = 1.5 * 2.0**23
"""float32 numbers around it are whole: adding it rounds, and leaves the number in the low bits."""


class Quantizer(NamedTuple):
  """Says how a group of consecutive numbers becomes codes and one scale."""

  group: int
  format: str
  scale: str
  stochastic: bool

  @property
  def form(self) -> Format:
    """Returns the dtype of the codes and the largest."""
    return FORMATS[self.format]

  @property
  def half_range(self) -> float:
    """Returns the largest |value / scale| of QuEST's mid-rise grid."""
    return (2 ** QUEST_BITS[self.format] - 1) / 2


def quantize(
  y_RW: jax.Array, quantizer: Quantizer, noise_RW: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes [R, W], scales [R, G] and, for "quest", the trust mask, int8 [R, W]."""
  R, W = y_RW.shape
  y_RGI = y_RW.astype(jnp.float32).reshape(R, -1, quantizer.group)
  noise_RGI = None if noise_RW is None else noise_RW.reshape(y_RGI.shape)
  scales_RG1 = scale_of_statistic(statistic(y_RGI, quantizer), quantizer)
  ratio_RGI = y_RGI / scales_RG1
  rounded_RGI = round_to_codes(ratio_RGI, quantizer, noise_RGI)
  codes_RW = cast(rounded_RGI, quantizer.form.dtype).reshape(R, W)
  mask_RW = None
  if quantizer.scale == "quest":
    mask_RW = is_trusted(ratio_RGI, quantizer).astype(jnp.int8).reshape(R, W)
  return codes_RW, scales_RG1[..., 0], mask_RW


def statistic(y: jax.Array, quantizer: Quantizer, axis: int = -1) -> jax.Array:
  """Returns what a group's scale is made of, with `axis` of size 1: largest |y|, or sum of y^2."""
  if quantizer.scale == "quest":
    return jnp.sum(y * y, axis=axis, keepdims=True)
  return largest_magnitude(y, axis, keepdims=True)


def scale_of_statistic(statistic: jax.Array, quantizer: Quantizer) -> jax.Array:
  """Returns the scale of a group.

  "absmax": the largest |y| over the largest code, a power of two for mxfp4; it never clips.
  "quest": the step of the mid-rise grid over [-A, A], A = clip * RMS + 1e-8 (arXiv 2502.05003).
  """
  if quantizer.scale == "quest":
    clip = QUEST_CLIP[QUEST_BITS[quantizer.format]]
    bound = clip * jnp.sqrt(statistic * (1 / quantizer.group)) + 1e-8
    return bound * (1 / quantizer.half_range)
  mode = "pow2" if quantizer.format == "mxfp4" else "f32"
  return scale_of_block(statistic, quantizer.form.largest, mode)


def round_to_codes(ratio: jax.Array, quantizer: Quantizer, noise: jax.Array | None) -> jax.Array:
  """Returns y / scale rounded to codes, in float32: half to even or, with noise, stochastically.

  The noise is uniform in [0, 1). The code c of the mid-rise grid stands for c + 1/2.
  """
  dtype, largest = quantizer.form
  if quantizer.scale == "quest":
    return jnp.rint(jnp.clip(ratio, -quantizer.half_range, quantizer.half_range) + 0.5) - 1
  if noise is not None:
    step = spacing(ratio, dtype)
    return jnp.clip(floor(ratio / step + noise) * step, -largest, largest)
  whole = jnp.issubdtype(dtype, jnp.integer)
  return jnp.rint(ratio) if whole else ratio.astype(dtype).astype(jnp.float32)


def floor(x: jax.Array) -> jax.Array:
  """Rounds down, by rounding to nearest: Mosaic GPU has no other."""
  nearest = jnp.rint(x)
  return jnp.where(nearest > x, nearest - 1, nearest)


def to_carrier(
  ratio: jax.Array,
  inverse: jax.Array,
  quantizer: Quantizer,
  noise: jax.Array | None,
  compiled: bool,
) -> jax.Array:
  """Rounds y / scale to a code and returns bfloat16 numbers whose low byte is the code's byte.

  A product with the identity moves them exactly, and `from_carrier` takes the bytes out. All of it
  is sums and shifts of float32 bits: adding a large number rounds, and leaves a whole number in the
  low bits. Where the inverse of the scale is 0 the ratio may be NaN, and the numbers are finite.
  """
  dtype = quantizer.form.dtype
  if noise is not None:
    ratio = round_to_codes(ratio, quantizer, noise)
  if not jnp.issubdtype(dtype, jnp.integer):
    bits = float_carrier(ratio, inverse, dtype)
  else:
    if quantizer.scale == "quest":
      ratio = jnp.clip(ratio, -quantizer.half_range, quantizer.half_range) + 0.5
    ratio = ratio if compiled else jnp.rint(ratio)  # XLA would add the constants
    # code + 128 is a byte without sign; exponents from 135 up invert its first bit
    bits = jax.lax.bitcast_convert_type(ratio + (ROUNDER + 0x4380 + 128), jnp.int32)
    # shifts of 31 leave 0 or -0 of NaN
    bits = (bits - 1 if quantizer.scale == "quest" else bits) << jnp.where(inverse == 0, 31, 16)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def float_carrier(ratio: jax.Array, inverse: jax.Array, dtype: Any) -> jax.Array:
  """Returns the bits of float32 numbers that carry the bytes of 8-bit floats.

  In |ratio| + ROUNDER * spacing the low bits count spacings and the exponent is the code's but for
  a constant; the code is the sum of both, also where it is subnormal. The sign becomes the last bit
  of the carrier's exponent, and what is not of a carrier's 16 bits is rounded away.
  """
  info = jnp.finfo(dtype)
  mask = jnp.where(inverse == 0, 0, 0x7FFFFFFF)  # |ratio|, or 0 for what is not finite
  bits = jax.lax.bitcast_convert_type(ratio, jnp.int32) & mask
  magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32)
  total = magnitude + spacing(magnitude, dtype, ROUNDER)
  bits = jax.lax.bitcast_convert_type(total, jnp.int32)
  first = ((127 + int(info.minexp) + 23 - info.nmant) << info.nmant) + (1 << (info.nmant - 1))
  positive = 0x43000000 - (first << 16)
  sign = jnp.where(ratio < 0, positive + 0x800000, positive)
  return (bits >> (7 - info.nmant)) + (bits << 16) + sign


def from_carrier(carrier: jax.Array, dtype: Any) -> jax.Array:
  """Returns the codes that numbers of `to_carrier` carry."""
  words = jax.lax.bitcast_convert_type(carrier.astype(jnp.bfloat16), jnp.int16)
  if jnp.issubdtype(dtype, jnp.floating):
    return jax.lax.bitcast_convert_type(words.astype(jnp.int8), dtype)
  return words.astype(jnp.int8).astype(dtype)


def cast(rounded: jax.Array, dtype: Any) -> jax.Array:
  """Casts rounded float32 numbers to codes; whole numbers are read off the sum's low bits."""
  if not jnp.issubdtype(dtype, jnp.integer):
    return rounded.astype(dtype)
  return jax.lax.bitcast_convert_type(rounded + ROUNDER, jnp.int32).astype(dtype)


def spacing(ratio: jax.Array, dtype: Any, factor: float = 1.0) -> jax.Array | float:
  """Returns the distance between neighbouring codes around a number, a power of two, * factor."""
  if jnp.issubdtype(dtype, jnp.integer):
    return factor
  info = jnp.finfo(dtype)
  bits = jax.lax.bitcast_convert_type(ratio, jnp.int32) & 0x7F800000
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)  # 2^floor(log2 |ratio|)
  return jnp.maximum(power, 2.0**info.minexp) * (2.0**-info.nmant * factor)


def is_trusted(ratio: jax.Array, quantizer: Quantizer) -> jax.Array:
  """Tells where |value - y| is at most half a step: |y| <= A + step / 2."""
  return jnp.abs(ratio) <= quantizer.half_range + 0.5


def decode(codes_RW: jax.Array, scales_RG: jax.Array, scale: str) -> jax.Array:
  """Returns the float32 numbers that codes and scales stand for."""
  values = codes_RW.astype(jnp.float32) + (0.5 if scale == "quest" else 0.0)
  groups = values.reshape(*scales_RG.shape, -1) * scales_RG[..., None]
  return groups.reshape(codes_RW.shape)
