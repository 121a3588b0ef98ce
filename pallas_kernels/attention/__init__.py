"""Attends: causal or not, with positions, segments, windows and soft caps."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
