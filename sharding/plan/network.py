"""Says how long a collective over mesh axes takes in a torus of TPUs or in nodes of GPUs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pallas_kernels.common.checks import check
from pallas_kernels.common.topology import Topology
from sharding.roofline import HOP_SECONDS


class Ring(NamedTuple):
  """Describes devices in a row."""

  size: int
  bytes_per_s: float
  """what one device sends to its neighbour in one direction"""
  wraps: bool
  """whether the last is a neighbour of the first"""

  @property
  def gather_rate(self) -> float:
    """Returns V over the time in which V bytes are gathered from all of the row."""
    if self.wraps:
      return 2 * self.bytes_per_s
    return self.bytes_per_s * self.size / (self.size - 1)

  @property
  def hop_seconds(self) -> float:
    """Returns what distance alone costs."""
    return HOP_SECONDS * (self.size / 2 if self.wraps else self.size - 1)


@dataclasses.dataclass(frozen=True)
class Torus:
  """Holds the rows of devices that each mesh axis larger than 1 lies along."""

  rings: Mapping[str, tuple[Ring, ...]]

  def seconds(self, kind: str, axes: Sequence[str], size: float) -> float:
    """Returns the time of a collective over these mesh axes.

    `size` is in bytes on one device: of a gather the result, of a reduce-scatter the operand.
    """
    rings = [ring for axis in axes for ring in self.rings[axis]]
    hops = sum(ring.hop_seconds for ring in rings)
    if kind == "collective-permute":
      return max(HOP_SECONDS, size / min(ring.bytes_per_s for ring in rings))
    if kind == "all-to-all":  # V = size * devices; half of it crosses the middle of each row
      return max(hops, max(_exchange_seconds(ring, size) for ring in rings))
    once = max(hops, size / sum(ring.gather_rate for ring in rings))
    return 2 * once if kind == "all-reduce" else once


def _exchange_seconds(ring: Ring, size: float) -> float:
  whole = size * ring.size
  return whole / ((8 if ring.wraps else 4) * ring.bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Nodes:
  """Holds how many GPUs of a node, and how many nodes, each mesh axis spans."""

  inside: Mapping[str, int]
  across: Mapping[str, int]
  egress: float
  node_egress: float
  node_devices: int

  def seconds(self, kind: str, axes: Sequence[str], size: float) -> float:
    """Returns the time of a collective over these mesh axes, as `Torus.seconds` does."""
    gpus = math.prod(self.inside[axis] for axis in axes)
    nodes = math.prod(self.across[axis] for axis in axes)
    groups = self.node_devices / gpus  # that share a node's way out
    if kind == "collective-permute":
      return size * self.node_devices / self.node_egress if nodes > 1 else size / self.egress
    if kind == "all-to-all":
      whole = size * gpus * nodes
      inside = whole / nodes * (gpus - 1) / (gpus**2 * self.egress)
      outside = whole * groups * (nodes - 1) / (nodes**2 * self.node_egress)
    else:
      inside = size * (gpus - 1) / (gpus * self.egress)
      outside = size * groups / self.node_egress if nodes > 1 else 0.0
    once = max(inside, outside)
    return 2 * once if kind == "all-reduce" else once


def place_axes(sizes: Mapping[str, int], topology: Topology) -> Torus | Nodes:
  """Lays mesh axes over the network, the innermost first, next to each other where they fit.

  An axis takes whole axes of the torus, as many as have its size together, as
  `jax.experimental.mesh_utils` does; else parts of them, which do not wrap round. A part whose
  neighbours lie k chips apart has a k-th of a link. The two devices of a chip are a row of their
  own, taken to be joined by as much as a link. Raises UserError where no figure is known.
  """
  used = {axis: size for axis, size in reversed(list(sizes.items())) if size > 1}
  return _in_nodes(used, topology) if topology.chip.node_devices else _in_torus(used, topology)


def _in_nodes(used: Mapping[str, int], topology: Topology) -> Nodes:
  chip, left = topology.chip, min(topology.chip.node_devices, topology.devices)
  inside, across = {}, {}
  for axis, size in used.items():
    inside[axis] = math.gcd(size, left)
    across[axis] = size // inside[axis]
    left //= inside[axis]
  egress, node_egress = chip.interconnect_bytes_per_s, chip.node_bytes_per_s
  rule = "the chip table has no figure for its network"
  check(egress is not None and node_egress is not None, "topology", topology.name, rule)
  assert egress is not None and node_egress is not None
  return Nodes(inside, across, egress, node_egress, min(chip.node_devices, topology.devices))


def _in_torus(used: Mapping[str, int], topology: Topology) -> Torus:
  link = topology.chip.link_bytes_per_s
  assert link is not None, "every TPU of the table has one"
  rows = [_Row(size, topology.wraps(axis)) for axis, size in enumerate(topology.shape)]
  rows.append(_Row(topology.chip.devices_per_chip, False))
  rings: dict[str, tuple[Ring, ...]] = {}
  for axis, size in used.items():
    rows = [row for row in rows if row.left > 1]
    whole = [row for row in rows if row.left == row.size]
    choices = (
      chosen
      for number in range(len(whole), 0, -1)
      for chosen in itertools.combinations(whole, number)
      if math.prod(row.size for row in chosen) == size
    )
    # else parts of what has been begun, before others are begun
    taken = next(choices, None) or sorted(rows, key=lambda row: row.left == row.size)
    parts = []
    for row in taken:
      part = math.gcd(size, row.left)
      if part > 1:
        parts.append(row.take(part, link))
        size //= part
    rings[axis] = tuple(parts)
  return Torus(rings)


@dataclasses.dataclass(eq=False)
class _Row:
  """Holds devices in a row of the network, of which mesh axes take parts from the inside."""

  size: int
  wraps: bool

  def __post_init__(self) -> None:
    self.left = self.size

  def take(self, part: int, link: float) -> Ring:
    """Takes `part` of what is left, neighbours as far apart as parts before it make them."""
    apart = self.size // self.left
    ring = Ring(part, link / apart, self.wraps and part == self.left)
    self.left //= part
    return ring
