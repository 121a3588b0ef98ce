"""What text costs without a neural model, in bits per byte: the numbers that any model has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from jaxlm.data.corpus import Corpus, Document


def baselines(corpus: Corpus) -> dict[str, float]:
  """Name -> bits per byte of the held-out text."""
  return {
    "zlib": zlib_bits_per_byte(corpus.heldout),
    "byte frequencies": unigram_bits_per_byte(corpus.train, corpus.heldout),
  }


def unigram_bits_per_byte(train: Iterable[Document], heldout: Iterable[Document]) -> float:
  """Cross-entropy of the held-out bytes under the byte frequencies of the training text, each count plus one."""
  counts = _byte_counts(train) + 1
  bits = np.log2(counts.sum()) - np.log2(counts)
  heldout_counts = _byte_counts(heldout)
  return float(heldout_counts @ bits / heldout_counts.sum())


def zlib_bits_per_byte(heldout: Iterable[Document]) -> float:
  """Compressed bits per byte of all held-out text at once, by DEFLATE at level 9 (RFC 1950, 1951)."""
  text = b"".join(document.text.encode() for document in heldout)
  return 8 * len(zlib.compress(text, 9)) / len(text)


def _byte_counts(documents: Iterable[Document]) -> np.ndarray:
  counts = np.zeros(256, np.int64)
  for document in documents:
    counts += np.bincount(np.frombuffer(document.text.encode(), np.uint8), minlength=256)
  return counts
