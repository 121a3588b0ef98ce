"""From mapped files into sharded arrays: one tensor at a time, never more on the host than the piece being filled."""

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

_ROWS = 256  # of the file; a block of so many stays in a core's cache while it is transposed
_PACKET = 8  # bytes that are moved as one where possible


class Source(NamedTuple):
  """One tensor as a view of its file in the target's orientation, and what to call before and after reading it."""

  values: np.ndarray
  prefetch: Callable[[], None]
  release: Callable[[], None]


def assemble(
  target: jax.ShapeDtypeStruct, sources: Sequence[Source], stacked: bool, pool: ThreadPoolExecutor
) -> jax.Array:
  """The array of the target's shape, dtype and sharding whose rows (or, not stacked, whole) are the sources.

  Each device's piece is filled from the files, cast on the way, and put on the device before the next one is begun;
  devices that hold the same piece share one filling.
  """
  sharding = target.sharding or SingleDeviceSharding(jax.local_devices()[0])
  shards = []
  for index, devices in _devices_by_piece(sharding, target.shape):
    piece = fresh_pages(tuple(stop - start for start, stop in index), target.dtype)
    rows = list(zip(piece, sources[slice(*index[0])])) if stacked else [(piece, sources[0])]
    within = tuple(slice(*bounds) for bounds in index[stacked:])
    for position, (row, source) in enumerate(rows):
      if position + 1 < len(rows):
        rows[position + 1][1].prefetch()
      copy(row, source.values[within], pool)
      source.release()
    shards += [jax.block_until_ready(jax.device_put(piece, device)) for device in devices]
  return jax.make_array_from_single_device_arrays(target.shape, sharding, shards)


def _devices_by_piece(sharding: Sharding, shape: tuple[int, ...]):
  """((start, stop) of every axis, the devices that hold it) for each different piece."""
  pieces: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape))
    pieces.setdefault(bounds, []).append(device)
  return pieces.items()


def fresh_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Zeros on pages of their own: aligned so that the CPU backend takes them as they are, without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray, pool: ThreadPoolExecutor) -> None:
  """target[...] = source, with a cast where the types differ; large matrices in parallel blocks."""
  if source.ndim < 2 or source.size < 1 << 16:
    target[...] = source
    return
  transposed = source.strides[0] < source.strides[1]

  def fill(start: int) -> None:
    block = (slice(None),) * transposed + (slice(start, start + _ROWS),)
    if transposed and target.dtype == source.dtype:
      _transpose(target[block], source[block].T)
    else:
      target[block] = source[block]

  list(pool.map(fill, range(0, source.shape[transposed], _ROWS)))


def _transpose(target_DF: np.ndarray, source_FD: np.ndarray) -> None:
  """target[...] = source.T. Packets of entries that lie side by side change places first, then entries within them."""
  D, F = target_DF.shape
  entries = _PACKET // source_FD.itemsize
  if D % entries:
    target_DF[...] = source_FD.T
    return
  packets_PF = np.ascontiguousarray(source_FD.view(np.uint64).T)
  split_PFE = packets_PF.view(source_FD.dtype).reshape(D // entries, F, entries)
  for entry in range(entries):
    target_DF[entry::entries] = split_PFE[:, :, entry]
