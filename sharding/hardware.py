"""Lists what accelerators can do at most: the chip table of `pallas_kernels.common.chips`."""

from pallas_kernels.common.chips import CHIPS, Chip, find_chip

__all__ = ["CHIPS", "Chip", "find_chip"]
