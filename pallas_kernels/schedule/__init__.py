"""What the TPU compiler scheduled for a Pallas kernel: cycles, MXU use, bytes, without a TPU."""

from pallas_kernels.schedule.analysis import Finding, analyse
from pallas_kernels.schedule.chips import CHIPS
from pallas_kernels.schedule.listing import DumpError

__all__ = ["CHIPS", "DumpError", "Finding", "analyse"]
