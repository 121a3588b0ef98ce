"""Lists the kernels of rotations, groups and packed weights that the report covers."""

# R rows, W width of the rotated axis
from __future__ import annotations

import math
from collections.abc import Iterator

from pallas_kernels.hadamard import hadamard, hadamard_quantize
from pallas_kernels.hadamard.codes import FormatName
from pallas_kernels.schedule.cases import Case, array

ROWS, WIDTH = 8192, 4096  # tokens and width of a model of 7B parameters


def quantized_cases() -> Iterator[Case]:
  """Yields each kernel at the shape that it is judged by."""
  yield from hadamard_cases()


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
