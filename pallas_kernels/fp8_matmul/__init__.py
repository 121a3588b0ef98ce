"""Multiplies matrices in 8-bit codes with a scale for each block, and trains through it."""

from pallas_kernels.fp8_matmul.api import describe, fp8_matmul
from pallas_kernels.fp8_matmul.codes import FORMATS, Quantized
from pallas_kernels.fp8_matmul.steps import (
  dequantize,
  quantize_blocks,
  quantize_tiles,
  scaled_matmul,
)

__all__ = [
  "FORMATS",
  "Quantized",
  "dequantize",
  "describe",
  "fp8_matmul",
  "quantize_blocks",
  "quantize_tiles",
  "scaled_matmul",
]
