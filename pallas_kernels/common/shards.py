"""Runs an operation on every device's shards: how inputs are spread, and the entry to shard_map.

On a mesh with Explicit axes the types of the inputs say how they are spread. An operation reads
that with `sharded_axes`, refuses what it cannot split, and calls `run_on_shards`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UnsupportedError

Axes = tuple[str, ...]


def sharded_axes(array: jax.Array, dimension: int) -> Axes:
  """Returns the Explicit mesh axes that a dimension is spread over; () off a mesh."""
  entry = jax.typeof(array).sharding.spec.partitions[dimension]
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_size(*arrays: Any) -> int:
  """Returns the devices of the largest mesh, of the current one and those in the arrays' types.

  Takes arrays or trees of them; axes of every type count; 1 without a mesh.
  """
  meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
  return max(1, *(mesh.size for mesh in (jax.sharding.get_abstract_mesh(), *meshes)))


def check_not_sharded(name: str, array: jax.Array, dimension: int) -> None:
  """Raises UnsupportedError when a dimension, of which each device needs all, is spread.

  `name` ends in a letter for each dimension, as in "k_BSKH".
  """
  axes = sharded_axes(array, dimension)
  if not axes:
    return
  mesh_shape = jax.typeof(array).sharding.mesh.shape
  devices = ", ".join(f"{axis}={mesh_shape[axis]}" for axis in axes)
  letter, size = name.rsplit("_", 1)[1][dimension], array.shape[dimension]
  raise UnsupportedError(
    f"{name}={jax.typeof(array)}: its {letter}={size} is spread over mesh axis {devices}, and each"
    " device needs all of it: gather it first, or set the axis to 1"
  )


def varying_axes(*arrays: Any) -> set[str]:
  """Returns the mesh axes over which any of the arrays (or trees) varies inside shard_map."""
  return set().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(arrays)))


def run_on_shards(
  function: Callable[..., Any],
  arrays: tuple[jax.Array | None, ...],
  layouts: tuple[tuple[Axes | None, ...], ...],
  out_specs: Any,
  *,
  check_vma: bool = True,
) -> Any:
  """Calls `function(*shards)` on every device.

  `layouts` has, for each array, the mesh axes of each of its dimensions (None or () for a whole
  dimension). Arrays that are None stay None. Arrays whose type says `reduced` over some axes stay
  so: their gradients leave as the devices' unsummed shares. `check_vma=False` is for kernels that
  do not say over which axes their outputs vary.
  """

  def reshard(array: jax.Array | None, layout: tuple[Axes | None, ...]) -> jax.Array | None:
    if array is None:
      return None
    reduced = jax.typeof(array).sharding.spec.reduced
    return jax.reshard(array, P(*(axes or None for axes in layout), reduced=reduced))

  spread = tuple(reshard(array, layout) for array, layout in zip(arrays, layouts, strict=True))
  in_specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, spread)
  local = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
  return local(*spread)


def vary_together(*arrays: Any) -> Any:
  """Makes all arrays vary over every axis that one of them varies over, inside shard_map.

  The transpose of that cast is the sum over the axis: it reduces the gradient of a replicated
  operand over the shards of the others. Over axes that an array is `reduced` over, its gradient
  is left unsummed.
  """
  everywhere = varying_axes(arrays)

  def cast(array: jax.Array) -> jax.Array:
    kind = jax.typeof(array).mat
    missing = everywhere - kind.varying
    for axes in (missing & kind.reduced, missing - kind.reduced):
      array = jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
    return array

  return jax.tree.map(cast, arrays)


def zeros_varying_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: Any) -> Any:
  """Returns zeros that vary over the mesh axes of `like`, as a loop's carry in shard_map must."""
  varying = tuple(varying_axes(like))
  zeros = jnp.zeros(shape, dtype)
  return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


def varying_struct(
  shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array
) -> jax.ShapeDtypeStruct:
  """Returns a kernel's output type that varies over the same mesh axes as `like`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
