"""Names accelerators that need not be there: chips in their network, for plans and compilers.

jax is imported where devices are made, so that a plan needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from typing import Any

from pallas_kernels.common.checks import check
from pallas_kernels.common.chips import CHIPS, Chip
from pallas_kernels.common.errors import UnsupportedError, UserError, import_extra

_HOST = (2, 2)  # chips of a TPU host along the first two axes


@dataclasses.dataclass(frozen=True)
class Topology:
  """Describes TPU chips in a mesh or torus, or GPUs in nodes; `parse_topology` makes it."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  """chips along each axis of the torus; one number for GPUs"""

  @property
  def chips(self) -> int:
    """Returns the number of chips."""
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    """Returns the number of devices as JAX counts them."""
    return self.chips * self.chip.devices_per_chip

  def wraps(self, axis: int) -> bool:
    """Tells whether the chips along an axis of the torus form a ring."""
    return bool(self.chip.ring_multiple) and self.shape[axis] % self.chip.ring_multiple == 0


def parse_topology(name: str) -> Topology:
  """Returns the topology of a name such as "v5p:4x4x4" or "h100-sxm:64".

  Raises UserError for an unknown chip, a shape that is none, and chips that hosts do not divide.
  """
  chip_name, _, shape_text = name.partition(":")
  example = "must be CHIP:SHAPE, as in v5p:4x4x4, v6e:16x16 or h100-sxm:64"
  check(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape_text) is not None, "topology", name, example)
  usable = [key for key, chip in CHIPS.items() if chip.torus_axes or chip.node_devices]
  rule = f"there is no chip {chip_name!r} with a known network; chips: {', '.join(usable)}"
  check(chip_name in usable, "topology", name, rule)
  chip = CHIPS[chip_name]
  shape = tuple(int(size) for size in shape_text.split("x"))
  axes = chip.torus_axes or 1
  rule = f"{chip_name} has {axes} axes" if axes > 1 else f"must be {chip_name}:COUNT"
  check(len(shape) == axes, "topology", name, f"{rule}, this shape has {len(shape)}")
  topology = Topology(name, chip, shape)
  most = chip.pod_chips
  rule = f"has {topology.chips} chips, a pod of {chip_name} has {most}"
  check(most is None or topology.chips <= most, "topology", name, rule)
  if chip.torus_axes and topology.chips > 1:
    rule = "a host has 2x2 chips, which must divide the first two axes (or ask for a single chip)"
    check(not any(n % host for n, host in zip(shape, _HOST)), "topology", name, rule)
  if nodes := chip.node_devices:
    whole = topology.chips <= nodes or topology.chips % nodes == 0
    rule = f"a node has {nodes}, which must divide a number above it"
    check(whole, "topology", name, rule)
  return topology


@functools.cache
def topology_devices(name: str) -> tuple[Any, ...]:
  """Returns the devices of a TPU topology from libtpu's compiler; nothing can run on them.

  Raises UserError for a name that `parse_topology` refuses or libtpu does not know,
  UnsupportedError for GPUs, MissingExtraError without libtpu.
  """
  topology = parse_topology(name)
  if not topology.chip.torus_axes:
    raise UnsupportedError(
      f"topology={name!r}: only TPU programs compile without the device (a plan takes GPUs, too)"
    )
  import_extra("libtpu", "tpu", "compiling for TPUs that are not here")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  import jax
  from jax.experimental import topologies

  options: dict[str, Any] = dict(topology.chip.topology_options)
  if topology.chips == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"topology={name!r}: {str(error).splitlines()[0]}") from error
  return tuple(described.devices)
