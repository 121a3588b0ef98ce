"""Fills sharded arrays from mapped files, one tensor at a time.

The host never holds more than the piece that is being filled.
"""

# D, F the axes of a matrix, P packets along D, E entries of a packet

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

_BLOCK_ROWS = 256  # rows of the file: a block stays in a core's cache while it is transposed
_PACKET_BYTES = 8  # moved as one where possible


class TensorSource(NamedTuple):
  """Names one tensor of a file."""

  values: np.ndarray
  """view of the file, in the orientation of the target"""
  prefetch: Callable[[], None]
  """reads its pages ahead"""
  release: Callable[[], None]
  """drops its pages after use"""


def assemble(
  target: jax.ShapeDtypeStruct,
  sources: Sequence[TensorSource],
  stacked: bool,
  pool: ThreadPoolExecutor,
) -> jax.Array:
  """Returns the array of the target's shape, dtype and sharding with the values of the sources.

  A stacked target has one source per row, else there is one source. Each device's piece is filled
  from the files, cast on the way, and put on the device before the next one is begun; devices
  with the same piece share one filling.
  """
  sharding = target.sharding or SingleDeviceSharding(jax.local_devices()[0])
  shards = []
  for index, devices in _devices_by_piece(sharding, target.shape):
    piece = allocate_pages(tuple(stop - start for start, stop in index), target.dtype)
    rows = list(zip(piece, sources[slice(*index[0])])) if stacked else [(piece, sources[0])]
    within = tuple(slice(*bounds) for bounds in index[stacked:])
    for position, (row, source) in enumerate(rows):
      if position + 1 < len(rows):
        rows[position + 1][1].prefetch()
      copy_matrix(row, source.values[within], pool)
      source.release()
    shards += [jax.block_until_ready(jax.device_put(piece, device)) for device in devices]
  return jax.make_array_from_single_device_arrays(target.shape, sharding, shards)


def _devices_by_piece(sharding: Sharding, shape: tuple[int, ...]):
  """Pairs each different piece, as (start, stop) of every axis, with the devices that hold it."""
  pieces: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape))
    pieces.setdefault(bounds, []).append(device)
  return pieces.items()


def allocate_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns zeros on pages of their own, aligned so that the CPU backend takes them uncopied."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def copy_matrix(target: np.ndarray, source: np.ndarray, pool: ThreadPoolExecutor) -> None:
  """Copies `source` into `target`, with a cast where the dtypes differ, in parallel blocks."""
  if source.ndim < 2 or source.size < 1 << 16:
    target[...] = source
    return
  transposed = source.strides[0] < source.strides[1]

  def fill(start: int) -> None:
    block = (slice(None),) * transposed + (slice(start, start + _BLOCK_ROWS),)
    if transposed and target.dtype == source.dtype:
      _transpose(target[block], source[block].T)
    else:
      target[block] = source[block]

  list(pool.map(fill, range(0, source.shape[transposed], _BLOCK_ROWS)))


def _transpose(target_DF: np.ndarray, source_FD: np.ndarray) -> None:
  """Copies the transpose of `source_FD` into `target_DF`.

  First transposes packets of entries that lie side by side, then the entries within them.
  """
  D, F = target_DF.shape
  entries = _PACKET_BYTES // source_FD.itemsize
  if D % entries:
    target_DF[...] = source_FD.T
    return
  packets_PF = np.ascontiguousarray(source_FD.view(np.uint64).T)
  split_PFE = packets_PF.view(source_FD.dtype).reshape(D // entries, F, entries)
  for entry in range(entries):
    target_DF[entry::entries] = split_PFE[:, :, entry]
