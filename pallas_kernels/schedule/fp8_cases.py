"""Lists the kernels of blockwise 8-bit products and of their quantisers that the report covers."""

# Y[M, N] = X[M, K] W[K, N]
from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import FORMATS, Quantized, scaled_matmul
from pallas_kernels.fp8_matmul.codes import FormatName
from pallas_kernels.fp8_matmul.quantize_tpu import quantize
from pallas_kernels.schedule.case import Case, array

M, K, N = 4096, 7168, 16384
NATIVE: dict[FormatName, tuple[str, ...]] = {"int8": ("v5e", "v5p", "v6e"), "e4m3fn": ("tpu7x",)}
"""Chips whose matrix unit multiplies codes of a format."""
DEEP = ("v6e", "tpu7x")
"""Chips whose matrix unit is 256 deep, which blocks of 256 fill."""


def fp8_cases() -> Iterator[Case]:
  """Yields the three products with blocks of 128, and of 256 where they fill the matrix unit."""
  for dtype, chips in NATIVE.items():
    yield from product_cases(dtype, 128, chips)
    yield from product_cases(dtype, 256, tuple(chip for chip in chips if chip in DEEP))
    yield from quantizer_cases(dtype, chips)


def product_cases(dtype: FormatName, block: int, chips: tuple[str, ...]) -> Iterator[Case]:
  """Yields the forward product, that of X's gradient and that of W's, of codes."""
  kind = FORMATS[dtype].dtype

  def operand(rows: int, columns: int, tile: tuple[int, int]) -> tuple[Any, Any]:
    scales = array(rows // tile[0], columns // tile[1], dtype=jnp.float32)
    return array(rows, columns, dtype=kind), scales

  flat, tall, square = (1, block), (block, 1), (block, block)
  x, w, dy = operand(M, K, flat), operand(K, N, square), operand(M, N, flat)
  x_tall, dy_tall = operand(M, K, tall), operand(M, N, tall)
  for name, left, right, axes, out_dtype in (
    ("forward", x, w, (1, 0), jnp.bfloat16),
    ("dX", dy, w, (1, 1), jnp.bfloat16),
    ("dW", x_tall, dy_tall, (0, 0), jnp.float32),
  ):
    multiply = functools.partial(
      scaled_matmul, axes=axes, block=block, out_dtype=out_dtype, implementation="pallas_tpu"
    )
    yield Case(
      name=f"fp8_matmul in {dtype} by {block}, {name}",
      shape=f"{M} x {K} x {N}",
      fn=lambda a, b, multiply=multiply: multiply(Quantized(*a), Quantized(*b)),
      args=(left, right),
      flops=2.0 * M * K * N,
      chips=chips,
    )


def quantizer_cases(dtype: FormatName, chips: tuple[str, ...]) -> Iterator[Case]:
  """Yields the quantisers; codes that leave a kernel transposed are counted as they leave it."""
  for name, sizes, given, block, transposed in (
    ("rows", (M, K), jnp.bfloat16, (1, 128), True),
    ("columns", (M, K), jnp.bfloat16, (128, 1), False),
    ("columns, transposed", (M, K), jnp.bfloat16, (128, 1), True),
    ("squares", (K, N), jnp.float32, (128, 128), False),
    ("squares, transposed", (K, N), jnp.float32, (128, 128), True),
  ):

    def fn(x: jax.Array, block=block, transposed=transposed) -> Any:
      codes, scales = quantize(x, block, FORMATS[dtype], "f32", transposed=transposed)
      return codes.T if transposed else codes, scales

    yield Case(
      name=f"fp8 quantiser to {dtype}, {name}",
      shape=f"{sizes[0]} x {sizes[1]} {jnp.dtype(given).name}",
      fn=fn,
      args=(array(*sizes, dtype=given),),
      flops=float(sizes[0] * sizes[1]),
      chips=chips,
    )
