"""Lists the kernels of rotations, groups and packed weights that the report covers."""

# R rows, W width of the rotated axis; M or T rows, K inner, N outer size of a matrix, E groups
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fp8_matmul.codes import FormatName as CodesName
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.hadamard import hadamard, hadamard_quantize
from pallas_kernels.hadamard.codes import FormatName
from pallas_kernels.lowbit_matmul import lowbit_matmul
from pallas_kernels.lowbit_matmul.packing import FORMATS
from pallas_kernels.lowbit_matmul.packing import FormatName as PackedName
from pallas_kernels.schedule.case import Case, array

ROWS, WIDTH = 8192, 4096  # tokens and width of a model of 7B parameters


def quantized_cases() -> Iterator[Case]:
  """Yields each kernel at the shape that it is judged by."""
  yield from hadamard_cases()
  yield from grouped_cases()
  yield from lowbit_cases()


def hadamard_cases() -> Iterator[Case]:
  """Yields rotations of 128 and of the whole width, with codes and without."""

  def codes_case(block: int, dtype: FormatName) -> Case:
    return Case(
      name=f"hadamard_quantize of {block} to {dtype}",
      shape=f"{ROWS} x {WIDTH} bf16, groups of 128",
      fn=lambda x_RW: hadamard_quantize(
        x_RW, group=128, dtype=dtype, block=block, implementation="pallas_tpu"
      )[:2],
      args=(array(ROWS, WIDTH),),
      flops=ROWS * WIDTH * math.log2(block),
    )

  yield codes_case(128, "int8")
  yield codes_case(128, "e4m3fn")
  yield codes_case(WIDTH, "int8")
  yield Case(
    name="hadamard of 128",
    shape=f"{ROWS} x {WIDTH} bf16",
    fn=lambda x_RW: hadamard(x_RW, block=128, implementation="pallas_tpu"),
    args=(array(ROWS, WIDTH),),
    flops=ROWS * WIDTH * math.log2(128),
  )


def grouped_cases() -> Iterator[Case]:
  """Yields products of 8 equal groups, in codes, at the shape of JAX's megablox.

  The gradient of the rows is the kernel of the forward product.
  """
  T, K, N, E = 8192, 2048, 2048, 8
  sizes_E = np.full(E, T // E, np.int32)
  formats: tuple[CodesName, ...] = ("int8", "e4m3fn")
  for dtype in formats:

    def product(x_TK: Any, w_EKN: Any, sizes_E: Any, dtype: CodesName = dtype) -> jax.Array:
      return grouped_matmul(x_TK, w_EKN, sizes_E, dtype=dtype, implementation="pallas_tpu")

    def gradients(x_TK: Any, w_EKN: Any, sizes_E: Any, dy_TN: Any, product: Any = product) -> Any:
      y_TN, pullback = jax.vjp(lambda x, w: product(x, w, sizes_E), x_TK, w_EKN)
      return y_TN, pullback(dy_TN)

    shape, args = f"{T} rows x {K} x {N}, {E} equal groups", (array(T, K), array(E, K, N), sizes_E)
    flops = 2.0 * T * K * N
    name = f"grouped_matmul in {dtype}"
    yield Case(name=name, shape=shape, fn=product, args=args, flops=flops, kernel="grouped_matmul")
    yield Case(
      name=f"{name}, dW",
      shape=shape,
      fn=gradients,
      args=(*args, array(T, N)),
      flops=flops,
      kernel="grouped_matmul_weights",
    )


def lowbit_cases() -> Iterator[Case]:
  """Yields products of 16 rows with the widest matrix of a model of 7B parameters."""
  M, K, N = 16, 4096, 14336
  formats: tuple[PackedName, ...] = ("int8", "int4", "int2", "binary")
  for dtype in formats:
    packed = array(FORMATS[dtype].bytes_of(K), N, dtype=jnp.uint8)
    yield Case(
      name=f"lowbit_matmul, {dtype}",
      shape=f"{M} x {K} x {N}, groups of 128",
      fn=lambda x, packed, scales, dtype=dtype: lowbit_matmul(
        x, packed, scales, dtype=dtype, group=128, implementation="pallas_tpu"
      ),
      args=(array(M, K), packed, array(K // 128, N, dtype=jnp.float32)),
      flops=2.0 * M * K * N,
    )
