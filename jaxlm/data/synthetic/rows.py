"""Makes batches of what tasks draw: rows of T + 1 tokens, and which of them are answers."""

# B rows, T positions, S = T + 1 tokens

from __future__ import annotations

import numpy as np

from jaxlm.data.packing import Batch


def predict(tokens_BS: np.ndarray, is_answer_BS: np.ndarray) -> Batch:
  """Returns rows in which every token is predicted from those before it, and answers alone count.

  `tokens_BS` are ids [B, T + 1], `is_answer_BS` bool of the same shape.
  """
  inputs_BT = np.ascontiguousarray(tokens_BS[:, :-1], np.int32)
  targets_BT = np.ascontiguousarray(tokens_BS[:, 1:], np.int32)
  return Batch(inputs_BT, targets_BT, is_answer_BS[:, 1:].astype(np.float32))


def draw_distinct(
  rng: np.random.Generator, rows: int, count: int, size: int, weights: np.ndarray | None = None
) -> np.ndarray:
  """Returns for each row `count` different numbers below `size` in random order, int [rows, count].

  With `weights` [size] they are drawn one after another with probabilities proportional to these
  (the Gumbel top-k trick; Kool et al. 2019, arXiv 1903.06059, section 2.3).
  """
  scores = rng.gumbel(size=(rows, size))
  if weights is not None:
    scores = scores + np.log(weights)
  return np.argsort(-scores, axis=1)[:, :count]
