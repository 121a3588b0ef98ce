"""Defines 8-bit codes with a scale for each block: formats, scales, rounding.

Every implementation, kernels included, calls these functions, so that codes and scales are the
same bits everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.chips import find_chip
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import device_kind, platform

FormatName = Literal["e4m3fn", "e5m2", "int8"]
ScaleMode = Literal["f32", "pow2"]
SCALE_MODES = ("f32", "pow2")
SMALLEST_NORMAL = 2.0**-126


class Format(NamedTuple):
  """Holds a format of codes: its dtype and its largest code that is finite and symmetric."""

  dtype: Any
  largest: float


FORMATS: dict[str, Format] = {
  "e4m3fn": Format(jnp.float8_e4m3fn, 448.0),
  "e5m2": Format(jnp.float8_e5m2, 57344.0),
  "int8": Format(jnp.int8, 127.0),
}


class Quantized(NamedTuple):
  """Holds codes and scales: x is about codes * scales, each scale over its block of x."""

  codes: jax.Array
  """of x's shape"""
  scales: jax.Array
  """float32, of x's shape divided by the block's, rounded up"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contraction:
  """Holds what a product of two quantised matrices needs to know beside them."""

  axes: tuple[int, int]
  """The contracted axis of the left and of the right matrix."""
  blocks: tuple[tuple[int, int], tuple[int, int]]
  """What a scale of the left and of the right matrix covers."""
  out_dtype: Any
  native: bool
  """Whether the chip multiplies the codes as they are; else they are widened."""
  interpret: Any = False

  @property
  def block(self) -> int:
    """Returns how many of the contracted numbers one product of scales covers."""
    return self.blocks[0][self.axes[0]]

  @property
  def sum_dtype(self) -> Any:
    """Returns the dtype of sums: float32, or wider for a wider result."""
    return jnp.promote_types(self.out_dtype, jnp.float32)


def scale_of_block(amax: jax.Array, largest: float, mode: str) -> jax.Array:
  """Returns the scale of blocks whose largest |x| is `amax`, float32: amax / largest.

  It is 1 where amax is 0 (or below the smallest normal number, which hardware flushes to 0), at
  least 2^-126, and for "pow2" rounded up to a power of two from the exponent's bits. There is no
  absolute floor, under which small gradients would vanish. NaN and infinity stay.
  """
  zero = amax < SMALLEST_NORMAL
  # XLA multiplies by the reciprocal of a constant divisor, which rounds otherwise.
  scale = jnp.where(zero, 1.0, amax) / jnp.where(zero, 1.0, largest)
  scale = jnp.where(scale < SMALLEST_NORMAL, SMALLEST_NORMAL, scale)  # a maximum may lose NaN
  if mode == "f32":
    return scale
  bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
  power = jax.lax.bitcast_convert_type((bits + 0x007FFFFF) & 0x7F800000, jnp.float32)
  return jnp.where(scale < jnp.inf, power, scale)


def largest_magnitude(x: jax.Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Any:
  """Returns the largest |x| along these axes in float32; NaN wins.

  It compares bits, because XLA's maximum on CPU may drop NaN.
  """
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
  return jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=keepdims), jnp.float32)


def encode(x: jax.Array, scale: jax.Array, form: Format, by_xla: bool = True) -> jax.Array:
  """Returns the codes of float32 numbers: x / scale, rounded half to even.

  XLA multiplies by the reciprocal of a divisor that is merely spread, which rounds otherwise; it is
  kept from that here unless the code is not compiled `by_xla`.

  |x| / scale exceeds the largest code at most in the last bit of float32, which is rounded away:
  nothing has to be clipped, and NaN stays NaN where the format has one.
  """
  scaled = x / (jnp.where(x == 0, 1.0, scale) if by_xla else scale)
  return (jnp.rint(scaled) if form.dtype == jnp.int8 else scaled).astype(form.dtype)


# ------------------------------------------------------------------------------------------ checks


def check_format(argument: str, name: Any) -> Format:
  """Returns the format of this name; raises UserError for an unknown one, and lists them."""
  check_choice(argument, name, tuple(FORMATS))
  return FORMATS[name]


def check_block(block: Any) -> None:
  """Raises UserError unless `block` is a positive integer."""
  good = isinstance(block, int) and not isinstance(block, bool) and block > 0
  check(good, "block", block, "must be a positive integer")


def check_scales(name: str, quantized: Quantized, block: tuple[int, int]) -> None:
  """Raises UserError unless the scales fit the codes under this block."""
  sizes = zip(quantized.codes.shape, block)
  check_shape(f"{name}.scales", quantized.scales, tuple(-(-size // b) for size, b in sizes))
  check_dtype(f"{name}.scales", quantized.scales, jnp.float32)


def multiplies(left: str, right: str) -> bool:
  """Tells whether the chip that is traced for has a matrix unit for codes of these formats."""
  dtypes = FORMATS[left].dtype, FORMATS[right].dtype
  if platform() == "tpu":
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.get_tpu_info().is_matmul_supported(*dtypes)
  chip = find_chip(device_kind()) if platform() == "gpu" else None
  rate = None if chip is None else chip.int8_flops if left == "int8" else chip.fp8_flops
  return rate is not None and (left == "int8") == (right == "int8")


def check_native(argument: str, left: str, right: str, allow_emulation: bool) -> None:
  """Raises UnsupportedError for a format that the chip can only emulate, unless that is allowed."""
  if allow_emulation or multiplies(left, right):
    return
  native = [name for name in FORMATS if multiplies(name, name)]
  raise UnsupportedError(
    f"{argument}={left!r}: {device_kind()!r} does not multiply these codes natively (it does: "
    f"{', '.join(native) or 'none'}); allow_emulation=True multiplies them as wider floats"
  )
