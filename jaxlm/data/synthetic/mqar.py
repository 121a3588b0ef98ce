"""Draws multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, appendix E)."""

# B rows, T positions, n pairs of a key and its value

from __future__ import annotations

import numpy as np

from jaxlm.data.packing import Batch
from jaxlm.data.synthetic.rows import draw_distinct
from pallas_kernels.common.checks import check

_POWER = 0.01


def mqar(
  rng: np.random.Generator, rows: int, *, V: int, T: int, pairs: int, random_filler: bool = False
) -> Batch:
  """Returns rows of `pairs` keys with their values, then each key once more, where it is asked for.

  Keys are ids 1 .. V/2 - 1, values V/2 .. V - 1, all different within a row. The rest of the row
  has (T - 2 pairs) / 2 places of two tokens, of which those soon after the pairs are likelier
  queries: place j with weight a (j + 1)^(a - 1), a = 0.01. The target at a query is its value.
  Other tokens are 0, or with `random_filler` any ids.
  """
  check(V % 2 == 0 and V >= 4, "V", V, "must be even and at least 4")
  check(T % 2 == 0, "T", T, "must be even")
  most = min(V // 2 - 1, T // 4)
  rule = f"must lie between 1 and {most}: V={V} has V/2 - 1 keys, T={T} room for T/4 pairs"
  check(1 <= pairs <= most, "pairs", pairs, rule)
  keys = 1 + draw_distinct(rng, rows, pairs, V // 2 - 1)
  values = V // 2 + draw_distinct(rng, rows, pairs, V // 2)
  places = (T - 2 * pairs) // 2
  weights = _POWER * np.arange(1.0, places + 1) ** (_POWER - 1)
  at = 2 * pairs + 2 * draw_distinct(rng, rows, pairs, places, weights)
  filler = rng.integers(0, V, (rows, T)) if random_filler else np.zeros((rows, T), int)
  inputs_BT = filler.astype(np.int32)
  inputs_BT[:, 0 : 2 * pairs : 2], inputs_BT[:, 1 : 2 * pairs : 2] = keys, values
  targets_BT, weights_BT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.float32)
  np.put_along_axis(inputs_BT, at, keys.astype(np.int32), axis=1)
  np.put_along_axis(targets_BT, at, values.astype(np.int32), axis=1)
  np.put_along_axis(weights_BT, at, np.float32(1), axis=1)
  return Batch(inputs_BT, targets_BT, weights_BT)
