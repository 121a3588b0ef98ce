"""Makes the device mesh: seven named axes, slowest network first, axes of size 1 kept.

jax is imported inside the functions, so that reading a configuration stays fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pallas_kernels.common.errors import UserError

if TYPE_CHECKING:
  from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Says how many devices each kind of parallelism gets; -1 on one axis takes all that are left."""

  data: int = -1
  """replicas of the model: splits the batch, all-reduces gradients once per step"""
  stage: int = 1
  """pipeline stages"""
  fsdp: int = 1
  """splits the batch and the weights; each layer gathers its weights when it runs"""
  context_ring: int = 1
  """splits the sequence; keys and values travel round a ring"""
  context_ulysses: int = 1
  """splits the sequence; attention swaps sequence shards for head shards"""
  expert: int = 1
  """splits the experts of a mixture, and the batch outside of it"""
  tensor: int = 1
  """splits heads, feed-forward width and vocabulary; norms split the sequence"""

  def __post_init__(self) -> None:
    for name, size in self.sizes().items():
      if size != -1 and size < 1:
        raise UserError(
          f"mesh.{name}={size}: an axis has at least 1 device (or -1 for all that are left)"
        )
    flexible = [name for name, size in self.sizes().items() if size == -1]
    if len(flexible) > 1:
      rule = f"only one axis may take the devices that are left, mesh.{flexible[0]} does"
      raise UserError(f"mesh.{flexible[1]}=-1: {rule}")

  def sizes(self) -> dict[str, int]:
    """Returns axis name -> size as written, in mesh order."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def resolve(self, devices: int) -> dict[str, int]:
    """Returns axis name -> size on `devices` devices; raises UserError where they do not fit."""
    sizes = self.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
      if devices % fixed:
        raise UserError(
          f"mesh {self.describe()}: {devices} devices cannot be split into groups of {fixed}"
        )
      return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    if fixed > devices:
      raise UserError(f"mesh {self.describe()}: needs {fixed} devices, there are {devices}")
    return sizes

  def describe(self) -> str:
    """Returns the axes that split something, such as "data 4 x tensor 2"."""
    return describe_sizes(self.sizes())


def describe_sizes(sizes: Mapping[str, int]) -> str:
  """Returns the axes whose size is not 1, such as "data 4 x tensor 2", or "1 device"."""
  return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1 device"


def bypass_compilation_cache() -> None:
  """Switches jax's compilation cache on disk off for the rest of this process.

  A program of several CPU devices that comes from the cache hangs (jax 0.10.2): each device runs
  independent collectives in an order of its own and waits for the others. Compiled anew it runs.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  if jax.config.values["jax_enable_compilation_cache"]:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of `config`, every axis Explicit (shardings are types).

  It takes the first of `devices`, by default all of jax's, in the order that suits their network.
  On several CPU devices it switches jax's compilation cache off. Raises UserError where devices do
  not fit, or where some process would have none in the mesh.
  """
  import jax
  from jax.experimental import mesh_utils

  devices = jax.devices() if devices is None else devices
  sizes = (config or MeshConfig()).resolve(len(devices))
  used = devices[: math.prod(sizes.values())]
  idle = {d.process_index for d in devices} - {d.process_index for d in used}
  if idle:
    raise UserError(
      f"mesh {describe_sizes(sizes)}: uses {len(used)} of {len(devices)} devices, "
      f"which leaves processes {sorted(idle)} without one; a mesh must use devices of every process"
    )
  if len(used) > 1 and used[0].platform == "cpu":
    bypass_compilation_cache()
  axis_types = (jax.sharding.AxisType.Explicit,) * len(sizes)
  try:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=used)
  except NotImplementedError:  # an axis would have to split an axis of the torus (v6e 4x4: 8 x 2)
    ordered = mesh_utils.create_device_mesh(
      tuple(sizes.values()), used, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(ordered, tuple(sizes), axis_types)
