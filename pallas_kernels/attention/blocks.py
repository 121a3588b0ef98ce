"""Divides the queries of attention into blocks of C, in bands that have their own keys."""

# T query positions, S key positions, H head width, C queries of a block
from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.attention.mask import Options

KEPT_LENGTH = 4096  # on CPU; computing blocks again takes about 1.3 times as long
LOOPED_LENGTH = 1024
BANDS = 8  # parts of T with their own range of keys: at most 1 / BANDS of the products are masked
BLOCK_BYTES = 2**27  # of one block's logits in float32, over all rows and heads


class Band(NamedTuple):
  """Describes queries [start, stop), C at a time, and the keys [first, last) that they see."""

  start: int
  stop: int
  C: int
  first: int
  last: int


class Plan(NamedTuple):
  """Says how the work is divided; hashable."""

  bands: tuple[Band, ...]
  keeps: bool  # whether the backward pass reads what the forward pass kept
  options: Options


def make_plan(
  q_shape: tuple[int, ...], S: int, options: Options, in_order: bool, may_keep: bool
) -> Plan:
  """Returns the plan for queries [B, T, N, H] and S keys.

  Bands of one block each where the backward pass keeps, else bands of loops.
  """
  B, T, N, H = q_shape
  keeps = may_keep and max(T, S) <= KEPT_LENGTH
  banded = options.causal and in_order and T <= S
  starts, C = _unrolled(T, H) if keeps else _looped(T, S, B * N, banded)
  bands = []
  for start, stop in zip(starts, [*starts[1:], T]):
    first, last = _keys(start, stop, T, S, options.window) if banded else (0, S)
    bands.append(Band(start, stop, min(C, stop - start), first, last))
  return Plan(tuple(bands), keeps, options)


def _unrolled(T: int, H: int) -> tuple[list[int], int]:
  """Returns where bands of one block start, at most about 16 of them, and the size of a block."""
  least = 64 if H < 64 else 128  # wide heads gain more from large products than masked entries cost
  C = max(least, -(-T // 16 // 64) * 64)
  return list(range(0, T, C)), C


def _looped(T: int, S: int, heads: int, banded: bool) -> tuple[list[int], int]:
  """Returns where bands of equal blocks start, the last for what is left, and the size of a block.

  `heads` counts the heads of all rows of the batch.
  """
  # two blocks and more of a long band make a loop: XLA cannot find that the backward pass computes
  # the forward pass's exponentials again, and keep these
  most = T // (2 * BANDS) if T > LOOPED_LENGTH else T
  C = min(most, 512, max(16, BLOCK_BYTES // (4 * heads * S) // 16 * 16))
  whole = T // C * C
  per_band = -(-whole // C // (BANDS if banded else 1)) * C
  return [*range(0, whole, per_band), *([whole] if whole < T else [])], C


def _keys(start: int, stop: int, T: int, S: int, window: int | None) -> tuple[int, int]:
  """Returns the first key that queries [start, stop) in order see, and the end of them."""
  ahead = S - T
  first = 0 if window is None else max(0, start + ahead - window + 1)
  return first, stop + ahead
