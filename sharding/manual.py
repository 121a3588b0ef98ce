"""Serves code inside `jax.shard_map` over all mesh axes, where arrays are one device's shards.

There a weight's gradient is the device's own share as long as the weight varies over every axis
(`vary`): differentiation then adds nothing over devices, and `sum_gradients` adds once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.common.shards import varying_axes
from sharding.rules import RULES, axes_in, mesh_shape


def all_axes() -> tuple[str, ...]:
  """Returns the axes of the mesh; those of one device count, as specs may name them."""
  return tuple(mesh_shape())


def vary(tree: Any, alike: tuple[str, ...] = ()) -> Any:
  """Types arrays as different on every device, but for axes over which they stay `alike`."""

  def cast(array: jax.Array) -> jax.Array:
    known = varying_axes(array).union(alike)
    missing = tuple(axis for axis in all_axes() if axis not in known)
    return jax.lax.pcast(array, missing, to="varying") if missing else array

  return jax.tree.map(cast, tree)


def keep_once(tree: Any) -> Any:
  """Types arrays as different on every device, where equal devices all but the first hold zeros.

  The sum over all devices then counts once what several of them have.
  """

  def keep(array: jax.Array) -> jax.Array:
    equal = [axis for axis in all_axes() if axis not in varying_axes(array)]
    if not equal:
      return array
    return jnp.where(jax.lax.axis_index(tuple(equal)) == 0, vary(array), 0)

  return jax.tree.map(keep, tree)


def gather_weights(params: Any, specs: Any) -> Any:
  """All-gathers what `embed` axes split (fsdp), so that a loop needs no collectives for weights."""

  def gather(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dimension, axes in _gathered(spec):
      w = jax.lax.all_gather(w, axes, axis=dimension, tiled=True)
    return w

  return jax.tree.map(gather, params, specs)


def sum_gradients(shares: Any, specs: Any) -> Any:
  """Sums the devices' shares of gradients and leaves them as the parameters' specs say."""

  def add(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dimension, axes in _gathered(spec):
      gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
    others = tuple(axis for axis in all_axes() if axis not in axes_in(spec))
    return jax.lax.psum(gradient, others) if others else gradient

  return jax.tree.map(add, shares, specs)


def _gathered(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
  """Returns the dimensions that a loop needs whole, each with the axes that split it."""
  dimensions = []
  for dimension, entry in enumerate(spec.partitions):
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if axes and set(axes) <= set(RULES.axes["embed"]):
      dimensions.append((dimension, axes))
  return dimensions
