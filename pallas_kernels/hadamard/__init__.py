"""Rotates by Hadamard matrices, and quantises what was rotated in the same pass."""

from pallas_kernels.hadamard.api import Rotated, dequantize, hadamard, hadamard_quantize

__all__ = ["Rotated", "dequantize", "hadamard", "hadamard_quantize"]
