"""Reads cycles, MXU use and HBM bytes of TPU kernels from the compiler, without a TPU."""

from pallas_kernels.schedule.analysis import Finding, analyse
from pallas_kernels.schedule.listing import DumpError

__all__ = ["DumpError", "Finding", "analyse"]
