"""Lists what accelerators can do at most: the chip table of `pallas_kernels.common.chips`."""

from pallas_kernels.common.chips import CHIPS, Chip, find_chip
from pallas_kernels.common.topology import Topology, parse_topology

__all__ = ["CHIPS", "Chip", "Topology", "find_chip", "parse_topology"]
