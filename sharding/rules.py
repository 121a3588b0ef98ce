"""Maps logical axis names to mesh axes: the only file of the model stack that knows the mesh axes.

Models name the axes of their arrays (`batch`, `embed`, `mlp`, ...); `RULES` says which mesh axes
split each of them. All functions use the mesh set by `jax.set_mesh`, and without one leave arrays
as they are.

Inside `jax.shard_map` over all axes (a pipeline) arrays are one device's shards, and their types do
not say how they lie. There weights are whole but for `tensor`, and what a function takes and
returns follows from the names: communication is written out where they change.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UserError

Names = tuple[str | None, ...]
# A decoding step has one position: it cannot be split, so that every device computes it.
_LENGTH_NAMES = ("length", "norm_length")


@dataclasses.dataclass(frozen=True)
class LogicalRules:
  """Maps logical axis names to the mesh axes that split them."""

  axes: Mapping[str, tuple[str, ...]]

  def spec(self, names: Names, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> P:
    """Returns the PartitionSpec of an array with these logical names (None: not split).

    `mesh_shape` gives the sizes of the mesh axes. Those of size 1 are left out, and a length of 1
    is not split. Raises UserError for a size that its mesh axes do not divide, ValueError for an
    unknown name and a mesh axis used twice.
    """
    if len(names) != len(shape):
      raise ValueError(f"names={names}: an array of shape {shape} needs {len(shape)} names")
    used: dict[str, str] = {}
    entries: list[Any] = []
    for name, size in zip(names, shape):
      axes = tuple(axis for axis in self._axes_of(name) if mesh_shape.get(axis, 1) > 1)
      if size == 1 and name in _LENGTH_NAMES:
        axes = ()
      parts = math.prod(mesh_shape[axis] for axis in axes)
      if size % parts:
        raise UserError(
          f"axis {name!r} of size {size} is not divisible by mesh axes {axes} of {parts} devices"
        )
      for axis in axes:
        if axis in used:
          raise ValueError(
            f"mesh axis {axis!r} would split both {used[axis]!r} and {name!r} of one array {names}"
          )
        used[axis] = str(name)
      entries.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*entries)

  def _axes_of(self, name: str | None) -> tuple[str, ...]:
    if name is None:
      return ()
    if name not in self.axes:
      near = difflib.get_close_matches(name, self.axes, n=3) or sorted(self.axes)
      raise ValueError(f"logical axis {name!r} is not in the rules; nearest: {', '.join(near)}")
    return self.axes[name]


RULES = LogicalRules(
  {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("context_ring", "context_ulysses"),
    "norm_length": ("context_ring", "context_ulysses", "tensor"),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "act_expert": ("expert",),
    # weights
    "embed": ("fsdp", "context_ring", "context_ulysses", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "embed_expert": ("fsdp", "context_ring", "context_ulysses"),
    "layers": ("stage",),
  }
)
_GRADIENT_AXES = ("data", "fsdp", "expert", "context_ring", "context_ulysses", "tensor")


def mesh_shape() -> Mapping[str, int]:
  """Returns axis name -> size of the current mesh; empty without one."""
  return jax.sharding.get_abstract_mesh().shape


def is_sharded() -> bool:
  """Returns whether the current mesh has more than one device, and types say how arrays lie."""
  return math.prod(mesh_shape().values()) > 1 and not is_manual()


def is_manual() -> bool:
  """Returns whether this is inside `jax.shard_map` over all axes of the mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.are_all_axes_manual


def manual_axes(name: str | None) -> tuple[str, ...]:
  """Returns the mesh axes that split an axis of this name; empty but inside `jax.shard_map`.

  The axes of "embed" are left out, as weights are whole there.
  """
  if name is None or name == "embed" or not is_manual():
    return ()
  return tuple(axis for axis in RULES.axes[name] if mesh_shape()[axis] > 1)


def own_part(x: jax.Array, *names: str | None) -> jax.Array:
  """Returns this device's part of what all have whole, inside `jax.shard_map`; elsewhere x.

  An axis of size 1 stays.
  """
  for dimension, name in enumerate(names):
    if (axes := manual_axes(name)) and x.shape[dimension] > 1:
      size = x.shape[dimension] // math.prod(mesh_shape()[axis] for axis in axes)
      x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dimension)
  return x


def weight_shape(shape: tuple[int, ...], *names: str | None) -> tuple[int, ...]:
  """Returns the shape that a weight of these names has here: smaller inside `jax.shard_map`."""
  parts = (math.prod(mesh_shape()[axis] for axis in manual_axes(name)) for name in names)
  return tuple(size // count for size, count in zip(shape, parts))


def spec(shape: tuple[int, ...], *names: str | None) -> P:
  """Returns the PartitionSpec that `RULES` gives an array of this shape on the current mesh."""
  return RULES.spec(names, shape, mesh_shape())


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Reshards `x` to where `RULES` wants it."""
  return jax.reshard(x, spec(x.shape, *names)) if is_sharded() else x


def shard_layers(stack: Any) -> Any:
  """Splits the leading axis of stacked layers over `stage`, if it divides them."""

  def split(w: jax.Array) -> jax.Array:
    if w.shape[0] % split_count("layers"):
      return w
    rest = jax.typeof(w).sharding.spec.partitions[1:]
    return jax.reshard(w, P(*spec(w.shape[:1], "layers"), *rest))

  return jax.tree.map(split, stack) if is_sharded() and split_count("layers") > 1 else stack


def gather_layers(stack: Any) -> Any:
  """Brings all layers of a stack that `stage` splits to every device."""

  def gather(w: jax.Array) -> jax.Array:
    now = jax.typeof(w).sharding.spec
    if now.partitions[0] is None:
      return w
    return jax.reshard(w, P(None, *now.partitions[1:], reduced=now.reduced))

  return jax.tree.map(gather, stack) if is_sharded() and split_count("layers") > 1 else stack


def out_sharding(shape: tuple[int, ...], *names: str | None) -> P | None:
  """Returns the spec of a contraction's result, for its `out_sharding`; None without a mesh."""
  return spec(shape, *names) if is_sharded() else None


def split_count(name: str) -> int:
  """Returns the number of parts into which the current mesh splits an axis of this name."""
  return math.prod(mesh_shape().get(axis, 1) for axis in RULES.axes[name])


def axes_in(partitions: P) -> set[str]:
  """Returns the mesh axes that a spec names."""
  return set(jax.tree.leaves(tuple(partitions)))


def defer_reduction(params: Any) -> Any:
  """Types parameters so that devices keep unsummed shares of gradients until `reduce_gradients`.

  The values stay where they are. It is called once per step, outside the loops over micro-batches
  and layers, so that each gradient crosses the `data` axis once (JAX documentation, "Explicit
  sharding", reduced and unreduced).
  """
  if not is_sharded():
    return params
  active = {axis for axis in _GRADIENT_AXES if mesh_shape().get(axis, 1) > 1}

  def defer(w: jax.Array) -> jax.Array:
    partitions = jax.typeof(w).sharding.spec
    return jax.reshard(w, P(*partitions, reduced=active - axes_in(partitions)))

  return jax.tree.map(defer, params)


def apply_undeferred(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """Returns function(*arrays) for arrays that `defer_reduction` or `all_gather` typed `reduced`.

  The function may be any, with a result of the first array's shape, which is spread and typed like
  that array. The price is that gradients are summed over devices here, once per call.
  """
  if not is_sharded():
    return function(*arrays)
  specs = [jax.typeof(x).sharding.spec for x in arrays]
  whole = [jax.reshard(x, P(*now.partitions)) for x, now in zip(arrays, specs)]
  return jax.reshard(function(*whole), P(*specs[0].partitions, reduced=specs[0].reduced))


def all_gather(x: jax.Array, *names: str | None) -> jax.Array:
  """All-gathers over mesh axes that `names` no longer has; the gradient comes by reduce-scatter.

  The result is typed `reduced` over them: only contractions may use it. Inside `jax.shard_map` what
  `names` calls "length" is taken to lie by "norm_length".
  """
  if is_manual() and "length" in names:
    axes = tuple(a for a in manual_axes("norm_length") if a not in manual_axes("length"))
    return jax.lax.all_gather(x, axes, axis=names.index("length"), tiled=True) if axes else x
  if not is_sharded():
    return x
  now = jax.typeof(x).sharding.spec
  wanted = spec(x.shape, *names)
  dropped = axes_in(now.partitions) - axes_in(wanted)
  return jax.reshard(x, P(*wanted, reduced=now.reduced | dropped))


def all_gather_weight(w: jax.Array, names: Names, dtype: Any, reduce_dtype: Any) -> jax.Array:
  """Casts a weight to `dtype` and all-gathers it over the mesh axes that `names` no longer has.

  Its gradient is summed over these axes in `reduce_dtype`, whatever `dtype` is (reduce-scatter),
  and comes back in the weight's own type. The result is typed `reduced`: only contractions may use
  it.
  """
  if not is_sharded():
    return w.astype(dtype)
  now = jax.typeof(w).sharding.spec

  @jax.custom_vjp
  def cast_and_gather(w: jax.Array) -> jax.Array:
    return all_gather(w.astype(dtype), *names)

  def scatter(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    own = P(*now.partitions, unreduced=now.reduced)
    return (jax.reshard(gradient.astype(reduce_dtype), own).astype(w.dtype),)

  cast_and_gather.defvjp(lambda w: (cast_and_gather(w), None), scatter)
  return cast_and_gather(w)


def reduce_gradients(grads: Any, params: Any) -> Any:
  """Sums the devices' shares of each gradient and shards it like its parameter."""
  if not is_sharded():
    return grads
  return jax.tree.map(lambda g, w: jax.reshard(g, jax.typeof(w).sharding.spec), grads, params)
