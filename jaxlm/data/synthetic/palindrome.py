"""Draws palindromes (Kimi Team 2025, arXiv 2510.26692, section 5.1)."""

# B rows, T positions

from __future__ import annotations

import numpy as np

from jaxlm.data.packing import Batch
from jaxlm.data.synthetic.rows import predict
from pallas_kernels.common.checks import check

SEPARATOR = 0


def palindrome(rng: np.random.Generator, rows: int, *, V: int, T: int) -> Batch:
  """Returns rows of T / 2 random tokens, a separator (id 0) and the same tokens backwards.

  The tokens are ids 1 .. V - 1; the loss is on the reversal alone.
  """
  check(T % 2 == 0 and T >= 2, "T", T, "must be even and at least 2")
  check(V >= 2, "V", V, "must be at least 2: a separator and a token")
  half = rng.integers(1, V, (rows, T // 2))
  middle = np.full((rows, 1), SEPARATOR)
  tokens_BS = np.concatenate((half, middle, half[:, ::-1]), axis=1)
  is_answer_BS = np.broadcast_to(np.arange(T + 1) > T // 2, tokens_BS.shape)
  return predict(tokens_BS, is_answer_BS)
