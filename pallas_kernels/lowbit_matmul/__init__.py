"""Multiplies by weights of 1 to 8 bits that are packed into bytes."""

from pallas_kernels.lowbit_matmul.api import lowbit_matmul
from pallas_kernels.lowbit_matmul.packing import pack, unpack

__all__ = ["lowbit_matmul", "pack", "unpack"]
