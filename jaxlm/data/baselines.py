"""Computes what text costs without a neural model, in bits per byte: what a model has to beat."""

from __future__ import annotations

import numpy as np

from jaxlm.data.store import TokenStore


def baselines(store: TokenStore) -> dict[str, float]:
  """Returns name -> bits per byte of the held-out text."""
  heldout = store.heldout
  assert heldout.zlib_size is not None
  return {
    "zlib": 8 * heldout.zlib_size / heldout.size,
    "byte frequencies": unigram_bits_per_byte(store.train.byte_counts, heldout.byte_counts),
  }


def unigram_bits_per_byte(train_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
  """Returns the cross-entropy of held-out bytes under the byte frequencies of the training text.

  Both are counts of the 256 bytes; one is added to each count of the training text.
  """
  counts = train_counts + 1
  bits = np.log2(counts.sum()) - np.log2(counts)
  return float(heldout_counts @ bits / heldout_counts.sum())
