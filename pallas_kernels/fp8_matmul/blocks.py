"""Chooses the TPU kernels' tiles from the shapes and the chip that is compiled for."""

# P rows and Q columns of a kernel's product, C contracted
from __future__ import annotations

from typing import Any, NamedTuple

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import round_up

LANES = 128


class Core(NamedTuple):
  """Holds what tiles depend on."""

  mxu_side: int
  vmem: int  # bytes
  interpret: Any = False

  @property
  def flags(self) -> dict[str, bool] | None:
    """Returns compiler flags: the scheduler that spills less, where 256-wide results crowd it."""
    return {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True} if self.mxu_side == 256 else None


def core(interpret: Any) -> Core:
  """Returns the core that is compiled for; in an interpreter one for which tiles are small."""
  if interpret:
    return Core(LANES, 64 * 2**20, interpret)
  info = pltpu.get_tpu_info()
  return Core(info.mxu_column_size, info.vmem_capacity_bytes)


class Tile(NamedTuple):
  """Holds sizes of a tile of the product and of the parts that are computed one by one."""

  P: int
  Q: int
  C: int
  part_P: int
  part_Q: int


def product_tile(P: int, Q: int, C: int, block: int, blockwise: bool, chip: Core) -> Tile:
  """Returns the tile of a product; `blockwise`: the left scales cover blocks, not single rows.

  Scales of single rows are spread over the lanes, which keeps the cross-lane units busy for as long
  as 256 columns keep the vector unit: a tile is wide where its rows have them.
  """
  if chip.interpret:
    sides, steps, part = (2 * LANES, 2 * LANES), 2, (LANES, LANES)
  elif chip.mxu_side == LANES:
    sides, steps, part = (512, 512), 8, (256, 256) if blockwise else (512, 512)
  elif blockwise:
    sides, steps, part = (1024, 1024), 8, (256, 256)
  else:
    sides, steps, part = (512, 4096), 4, (512, 256)
  P, Q = _side(P, sides[0]), _side(Q, sides[1])
  blocks_of_c = -(-C // block)
  divisors = [n for n in range(1, steps + 1) if blocks_of_c % n == 0]
  steps = divisors[-1] if 2 * divisors[-1] > steps else min(steps, blocks_of_c)
  return Tile(P, Q, steps * block, _part(P, part[0]), _part(Q, part[1]))


def _part(size: int, most: int) -> int:
  """Returns the largest divisor of a tile's side that is at most `most`, in whole lanes."""
  return max(n for n in range(LANES, min(size, most) + 1, LANES) if size % n == 0)


def _side(size: int, most: int, unit: int = LANES) -> int:
  """Returns a tile's side, at most `most`, for as little padding as equal tiles need."""
  side = -(-size // -(-size // most))
  return round_up(side, 2 * LANES if unit == LANES and side > 2 * LANES else unit)


def quantizer_tile(M: int, N: int, block: int, chip: Core) -> tuple[int, int]:
  """Returns the rows and columns that one step of a quantiser reads.

  On tpu7x the 250 cycles in which a step starts its copies are a tenth of 1024 x 1024.
  """
  unit = max(block, LANES)
  if chip.interpret:
    sides = max(block, 2 * LANES), max(block, 2 * LANES)
  else:
    sides = (1024, 1024) if chip.mxu_side == LANES else (2048, 1024)
  return _side(M, sides[0], unit), _side(N, sides[1], unit)
