"""Attends to compressed blocks, to the blocks that these select, and to a window (NSA)."""

from pallas_kernels.sparse_attention.api import (
  KeysValues,
  Selection,
  nsa_attention,
  nsa_select,
  nsa_selected_attention,
)
from pallas_kernels.sparse_attention.compression import (
  block_starts,
  compress_linear,
  compress_mean,
  compress_mlp,
)
from pallas_kernels.sparse_attention.places import BlockSizes

__all__ = [
  "BlockSizes",
  "KeysValues",
  "Selection",
  "block_starts",
  "compress_linear",
  "compress_mean",
  "compress_mlp",
  "nsa_attention",
  "nsa_select",
  "nsa_selected_attention",
]
