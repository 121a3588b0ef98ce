"""Quantises matrices and multiplies their codes, one step at a time and without gradients."""

# M, N rows and columns of a matrix or of a product, K contracted
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.fp8_matmul import reference
from pallas_kernels.fp8_matmul.api import Implementation, choose
from pallas_kernels.fp8_matmul.codes import (
  FORMATS,
  SCALE_MODES,
  Contraction,
  FormatName,
  Quantized,
  ScaleMode,
  check_block,
  check_format,
  check_native,
  check_scales,
  multiplies,
)


def quantize_tiles(
  x_MK: jax.Array,
  axis: int,
  *,
  block: int = 128,
  dtype: FormatName = "e4m3fn",
  scale: ScaleMode = "f32",
) -> Quantized:
  """Returns codes of X and a float32 scale for each tile of 128 numbers along one axis.

  The scales are [M, ceil(K / 128)] for axis 1 (activations), [ceil(M / 128), K] for axis 0.
  """
  check_choice("axis", axis, (0, 1))
  return _quantize("x_MK", x_MK, block, (1, block) if axis == 1 else (block, 1), dtype, scale)


def quantize_blocks(
  w_KN: jax.Array,
  *,
  block: int = 128,
  dtype: FormatName = "e4m3fn",
  scale: ScaleMode = "f32",
) -> Quantized:
  """Returns codes of W and scales [ceil(K / 128), ceil(N / 128)] of its blocks of 128 x 128."""
  return _quantize("w_KN", w_KN, block, (block, block), dtype, scale)


def _quantize(
  name: str, x: jax.Array, block: int, shape: tuple[int, int], dtype: str, scale: str
) -> Quantized:
  check_block(block)
  check_choice("scale", scale, SCALE_MODES)
  check_shape(name, x, (None, None))
  check_dtype(name, x, jnp.floating)
  return reference.quantize(x, shape, check_format("dtype", dtype), scale)


def dequantize(
  codes: jax.Array, scales: jax.Array, block: tuple[int, int], dtype: Any = jnp.float32
) -> jax.Array:
  """Returns codes * scales; `block` is what a scale covers, as (1, 128), (128, 1), (128, 128)."""
  quantized = Quantized(codes, scales)
  check_shape("codes", codes, (None, None))
  check_scales("dequantize", quantized, block)
  return reference.dequantize(quantized, block, dtype)


def scaled_matmul(
  left: Quantized,
  right: Quantized,
  *,
  axes: tuple[int, int] = (1, 0),
  block: int = 128,
  out_dtype: Any = jnp.float32,
  allow_emulation: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Contracts two quantised matrices over `axes`, a block of scales at a time; no gradient.

  (1, 0) is the forward product X W, (1, 1) that of X's gradient dY W^T, (0, 0) that of W's
  gradient X^T dY. The scales of either say whether they cover tiles of `block` numbers along the
  contracted axis or blocks of `block` x `block`.
  """
  names = []
  blocks = []
  check_block(block)
  for name, operand, axis in (("left", left, axes[0]), ("right", right, axes[1])):
    check_choice("axes", axis, (0, 1))
    check_shape(f"{name}.codes", operand.codes, (None, None))
    formats = [key for key, form in FORMATS.items() if form.dtype == operand.codes.dtype]
    check(bool(formats), f"{name}.codes.dtype", operand.codes.dtype, f"none of {list(FORMATS)}")
    names += formats
    free = operand.codes.shape[1 - axis]
    tile = block if operand.scales.shape[1 - axis : 2 - axis] != (free,) else 1
    blocks.append((block, tile) if axis == 0 else (tile, block))
    check_scales(name, operand, blocks[-1])
  sizes = left.codes.shape[axes[0]], right.codes.shape[axes[1]]
  check(sizes[0] == sizes[1], "axes", axes, f"contract sizes {sizes[0]} and {sizes[1]}")
  if not interpret:
    check_native("left.codes", names[0], names[1], allow_emulation)
  how = Contraction(
    axes=axes,
    blocks=(blocks[0], blocks[1]),
    out_dtype=jnp.dtype(out_dtype),
    native=bool(interpret) or multiplies(names[0], names[1]),
    interpret=interpret,
  )
  chosen = choose(implementation, block, (names[0], names[1]), interpret)
  return chosen.contract(left, right, how)
