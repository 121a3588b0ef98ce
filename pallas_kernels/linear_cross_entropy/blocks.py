"""How large the tiles are, from the shapes and the chip at hand."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

MEBI = 2**20
LANES = 128
LOGIT_BYTES = (
  20  # a tile's logits, their gradient in float32 and in the input's dtype, and what spills
)

# Up to this many entries rows of logits are short: whole chunks of them fit where one tile would.
SMALL_VOCABULARY = 4096


class Blocks(NamedTuple):
  """Rows of E and entries of C in one tile of logits."""

  rows: int
  entries: int


def xla_tiles(N: int, V: int) -> Blocks:
  """Tiles of at most 2 MiB of float32 logits, large enough for matrix products to run at full speed."""
  return Blocks(min(N, 512), min(V, 1024))


def xla_chunk(N: int, V: int) -> Blocks:
  """Tiles where a chunk of rows keeps its logits: N / 8 rows, 128 to 512; for a small vocabulary what 32 MiB hold."""
  if V <= SMALL_VOCABULARY:
    return Blocks(min(N, 8 * MEBI // V), V)
  return Blocks(min(N, max(128, min(N // 8, 512))), 2048)


class Chip(NamedTuple):
  """What tile sizes depend on; one core's memory, the whole device's rates."""

  vmem: int  # bytes
  cores: int  # that share one device and its HBM
  flops_per_byte: float  # bfloat16 rate / HBM rate
  largest_tile: int = 4096


def device_kind() -> str:
  """Of the mesh in use, else of the default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def tpu_chip(interpret: bool) -> Chip:
  """The chip that is being compiled for; a small one for the interpreter, so that small inputs have many tiles."""
  if interpret:
    return Chip(64 * MEBI, 1, 240, largest_tile=LANES)
  info = pltpu.get_tpu_info()
  return Chip(
    info.vmem_capacity_bytes,
    info.num_cores,
    info.bf16_ops_per_second / info.mem_bw_bytes_per_second,
  )


def tpu_forward(N: int, V: int, D: int, dtype: jnp.dtype, chip: Chip) -> Blocks | None:
  """E stays in VMEM while C streams past: 2 rows / itemsize flop per byte. None: not even a small tile fits."""
  item = jnp.dtype(dtype).itemsize

  def vmem(tile: Blocks) -> int:
    return 2 * (tile.rows + tile.entries) * D * item + LOGIT_BYTES * tile.rows * tile.entries

  return _fitting(_wanted_rows(chip.flops_per_byte * item / 2), 1024, vmem, chip, N, V)


def tpu_backward(N: int, V: int, D: int, dtype: jnp.dtype, chip: Chip) -> Blocks | None:
  """6 rows flop against a read of C and a read and a write of its float32 gradient. None: no tile fits."""
  item = jnp.dtype(dtype).itemsize

  def vmem(tile: Blocks) -> int:
    held = (
      tile.rows * D * (2 * item + 2 * 4)
    )  # E, its masked copy, and the two buffers of its gradient
    streamed = 2 * tile.entries * D * (item + 2 * 4)
    return held + streamed + LOGIT_BYTES * tile.rows * tile.entries

  return _fitting(_wanted_rows(chip.flops_per_byte * (8 + item) / 6), 512, vmem, chip, N, V)


def _wanted_rows(balance: float) -> int:
  """A power of two from 1024 up, half as much again as the rows at which HBM and MXU take the same time."""
  return max(1024, 2 ** math.ceil(math.log2(1.5 * balance)))


def _fitting(
  rows: int, entries: int, vmem: Callable[[Blocks], int], chip: Chip, N: int, V: int
) -> Blocks | None:
  """The wanted tile, halved until it fits in 85 % of VMEM, and no larger than the inputs in whole lanes."""
  tile = Blocks(min(rows, chip.largest_tile), min(entries, chip.largest_tile))
  while vmem(tile) > 0.85 * chip.vmem:
    if tile.entries > 256 or LANES == tile.rows < tile.entries:
      tile = Blocks(tile.rows, tile.entries // 2)
    elif tile.rows > LANES:
      tile = Blocks(tile.rows // 2, tile.entries)
    else:
      return None
  return Blocks(min(tile.rows, whole_lanes(N)), min(tile.entries, whole_lanes(V)))


def whole_lanes(size: int) -> int:
  return -(-size // LANES) * LANES
