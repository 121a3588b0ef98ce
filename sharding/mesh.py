"""The device mesh: seven named axes, slowest network first, axes of size 1 kept.

jax is imported inside the functions, so that reading a configuration stays fast.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices each kind of parallelism gets; -1 on one axis takes all that are left."""

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
        raise ValueError(
          f"mesh.{name}={size}: an axis has at least 1 device (or -1 for all that are left)"
        )
    free = [name for name, size in self.sizes().items() if size == -1]
    if len(free) > 1:
      raise ValueError(
        f"mesh.{free[1]}=-1: only one axis may take the devices that are left, mesh.{free[0]} does"
      )

  def sizes(self) -> dict[str, int]:
    """Axis name -> size as written, in mesh order."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def resolve(self, devices: int) -> dict[str, int]:
    """Axis name -> size on `devices` devices; ValueError when they do not fit."""
    sizes = self.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
      if devices % fixed:
        raise ValueError(
          f"mesh {self.describe()}: {devices} devices cannot be split into groups of {fixed}"
        )
      return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    if fixed > devices:
      raise ValueError(f"mesh {self.describe()}: needs {fixed} devices, there are {devices}")
    return sizes

  def describe(self) -> str:
    return (
      " x ".join(f"{name} {size}" for name, size in self.sizes().items() if size != 1) or "1 device"
    )


def make_mesh(config: MeshConfig | None = None) -> Mesh:
  """The mesh of `config` over the first devices, every axis Explicit (shardings are types)."""
  import jax

  sizes = (config or MeshConfig()).resolve(jax.device_count())
  count = math.prod(sizes.values())
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes),
    devices=jax.devices()[:count],
  )
