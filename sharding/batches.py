"""Batches across processes: which rows a process builds, and how they become one global array."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from sharding.rules import spec


def local_rows(batch: int) -> slice:
  """The rows of a global batch that this process's devices hold under the current mesh."""
  sharding = NamedSharding(jax.sharding.get_mesh(), spec((batch,), "batch"))
  held = sharding.addressable_devices_indices_map((batch,)).values()
  parts = [index[0].indices(batch) for index in held if index is not None]
  return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def globalize(tree: Any, batch: int) -> Any:
  """Local numpy rows [b, ...] -> global arrays [batch, ...] sharded by rows."""

  def leaf(x: np.ndarray) -> jax.Array:
    shape = (batch, *x.shape[1:])
    sharding = NamedSharding(jax.sharding.get_mesh(), spec(shape, "batch", *[None] * (x.ndim - 1)))
    return jax.make_array_from_process_local_data(sharding, x, shape)

  return jax.tree.map(leaf, tree)
