"""Chooses the TPU kernels' tiles from the shapes and the chip that is compiled for."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.common.chips import find_chip
from pallas_kernels.common.padding import round_up
from pallas_kernels.common.platform import device_kind
from pallas_kernels.linear_cross_entropy.terms import TileSize

LANES = 128
LOGIT_BYTES = 20
"""VMEM of a logit: itself, its gradient in float32 and in the input's dtype, and what spills."""


class TileLimits(NamedTuple):
  """Holds what tile sizes depend on: the memory of a core, the rates of the whole device."""

  vmem: int  # bytes
  cores: int  # that share one device and its HBM
  flops_per_byte: float  # bfloat16 rate / HBM rate
  largest_tile: int = 4096


def tile_limits(interpret: Any) -> TileLimits:
  """Returns the limits of the chip that is compiled for, as jax and the chip table state them.

  In an interpreter tiles are small, so that small inputs have many; a simulator says its cores.
  """
  if interpret:
    cores = getattr(interpret, "num_cores_or_threads", 1)
    return TileLimits(64 * 2**20, cores, flops_per_byte=240, largest_tile=LANES)
  info, chip = pltpu.get_tpu_info(), find_chip(device_kind())
  if chip is not None and chip.bf16_flops is not None:
    flops_per_byte = chip.bf16_flops / chip.hbm_bytes_per_s
  else:
    flops_per_byte = info.bf16_ops_per_second / info.mem_bw_bytes_per_second
  return TileLimits(info.vmem_capacity_bytes, info.num_cores, flops_per_byte)


def forward_tile(N: int, V: int, D: int, dtype: DTypeLike, limits: TileLimits) -> TileSize | None:
  """Returns the forward tile, or None if not even a small one fits.

  E stays in VMEM while C streams past: 2 rows / itemsize FLOP per byte.
  """
  item = jnp.dtype(dtype).itemsize

  def vmem(tile: TileSize) -> int:
    return 2 * (tile.rows + tile.entries) * D * item + LOGIT_BYTES * tile.rows * tile.entries

  return _fit(_balanced_rows(limits.flops_per_byte * item / 2), 1024, vmem, limits, N, V)


def backward_tile(N: int, V: int, D: int, dtype: DTypeLike, limits: TileLimits) -> TileSize | None:
  """Returns the backward tile, or None if not even a small one fits.

  6 rows FLOP against a read of C and a read and a write of its float32 gradient.
  """
  item = jnp.dtype(dtype).itemsize

  def vmem(tile: TileSize) -> int:
    # E, its masked copy, and the two buffers of its gradient
    held = tile.rows * D * (2 * item + 2 * 4)
    streamed = 2 * tile.entries * D * (item + 2 * 4)
    return held + streamed + LOGIT_BYTES * tile.rows * tile.entries

  return _fit(_balanced_rows(limits.flops_per_byte * (8 + item) / 6), 512, vmem, limits, N, V)


def _balanced_rows(balance: float) -> int:
  """Returns a power of two: 1.5 times the rows at which HBM and MXU take equally long, or 1024."""
  return max(1024, 2 ** math.ceil(math.log2(1.5 * balance)))


def _fit(
  rows: int, entries: int, vmem: Callable[[TileSize], int], limits: TileLimits, N: int, V: int
) -> TileSize | None:
  """Halves the tile until it fits in 85 % of VMEM, no larger than the inputs in whole lanes."""
  tile = TileSize(min(rows, limits.largest_tile), min(entries, limits.largest_tile))
  while vmem(tile) > 0.85 * limits.vmem:
    if tile.entries > 256 or LANES == tile.rows < tile.entries:
      tile = TileSize(tile.rows, tile.entries // 2)
    elif tile.rows > LANES:
      tile = TileSize(tile.rows // 2, tile.entries)
    else:
      return None
  return TileSize(min(tile.rows, round_up(N, LANES)), min(tile.entries, round_up(V, LANES)))
