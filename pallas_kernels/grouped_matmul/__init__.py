"""Multiplies rows that are sorted by group, each group with its own matrix."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
