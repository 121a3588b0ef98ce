"""Says which rows of a batch a process builds, and joins them into one global array."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sharding.rules import RULES, spec


def local_rows(batch: int) -> np.ndarray:
  """Returns the rows of a global batch that this process's devices hold under the current mesh.

  The indices are int64 and ascending. They need not be contiguous: `jax.make_mesh` orders the
  devices along the torus of the chips, which may visit a host more than once.
  """
  return rows_of_process(jax.sharding.get_mesh(), batch, jax.process_index())


def rows_of_process(mesh: Mesh, batch: int, process: int) -> np.ndarray:
  """Returns the ascending rows [b] of a batch that the devices of one process hold on `mesh`.

  Two processes hold the same rows where only axes that do not split the batch lie between them.
  """
  partitions = RULES.spec(("batch",), (batch,), mesh.shape)
  positions = NamedSharding(mesh, partitions).devices_indices_map((batch,))
  held = np.zeros(batch, bool)
  for device in mesh.devices.flat:
    if device.process_index == process:
      held[positions[device]] = True
  return np.flatnonzero(held)


def globalize(tree: Any, batch: int) -> Any:
  """Makes global arrays [batch, ...], sharded by rows, of numpy arrays that hold `local_rows`."""
  rows = local_rows(batch)

  def make_global(local: np.ndarray) -> jax.Array:
    shape = (batch, *local.shape[1:])
    names = ("batch", *[None] * (local.ndim - 1))
    sharding = NamedSharding(jax.sharding.get_mesh(), spec(shape, *names))

    def rows_of_device(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch)  # contiguous in the batch, so among `rows`, too
      first = int(np.searchsorted(rows, start))
      return local[first : first + stop - start]

    return jax.make_array_from_callback(shape, sharding, rows_of_device)

  return jax.tree.map(make_global, tree)
