"""A stream of tokens cut into rows for training and evaluation; pure numpy.

The stream is eos, document, eos, document, ..., eos, so that the first token of a document is predicted too, from the
eos before it. A row predicts a span of the stream from the tokens one place earlier:

  windows  spans of `length` tokens one after another, whatever documents they touch
  packed   whole documents side by side in a row; segments keep attention and positions apart

Either way each token but the first eos is the target of exactly one position.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

# B rows of a batch, T positions of a row, S tokens of the stream, D documents, C cuts of documents, R rows in all


class Batch(NamedTuple):
  """Rows of numpy arrays, and of jax arrays once they are on the devices."""

  inputs_BT: Any
  """int32"""
  targets_BT: Any
  """int32, the token after each input"""
  weights_BT: Any
  """float32, 1 where the target counts and 0 where there is padding"""
  positions_BT: Any | None = None
  """int32, from 0 in each segment; None where rows are single segments"""
  segment_ids_BT: Any | None = None
  """int32, 1, 2, ... along the row and 0 for padding; None where rows are single segments"""


class Rows(Protocol):
  def __len__(self) -> int: ...

  def take(self, index_B: np.ndarray) -> Batch:
    """Builds these rows; an index past the end gives a row of padding (all weights 0)."""


def join(
  documents: Iterable[np.ndarray], eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """The stream of all documents, and where its D + 1 eos are: tokens_S of `dtype`, borders_D int64."""
  end = np.array([eos], dtype)
  parts, sizes = [end], [0]
  for document in documents:
    parts += [document, end]
    sizes.append(len(document) + 1)
  return np.concatenate(parts, dtype=dtype), np.cumsum(sizes)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Row r predicts the stream's tokens r * length + 1 to (r + 1) * length."""

  tokens_S: np.ndarray
  length: int

  def __len__(self) -> int:
    return -(-(len(self.tokens_S) - 1) // self.length)

  def take(self, index_B: np.ndarray) -> Batch:
    starts_B = np.asarray(index_B, np.int64) * self.length
    place_BX = starts_B[:, None] + np.arange(self.length + 1)  # X = T + 1
    last = len(self.tokens_S) - 1
    row_BX = self.tokens_S[np.minimum(place_BX, last)].astype(np.int32)
    return Batch(row_BX[:, :-1], row_BX[:, 1:], (place_BX[:, 1:] <= last).astype(np.float32))


def windows(tokens_S: np.ndarray, length: int, *, keep_last: bool = False) -> Windows:
  """Rows of `length` targets, each token the target of one; the last, incomplete one is dropped, or padded."""
  count = (len(tokens_S) - 1) // length
  return Windows(tokens_S if keep_last else tokens_S[: count * length + 1], length)


@dataclasses.dataclass(frozen=True)
class Packed:
  """Row r holds the cuts order_C[rows_R[r] : rows_R[r + 1]], each `sizes_C` targets from stream place `starts_C`."""

  tokens_S: np.ndarray
  length: int
  starts_C: np.ndarray
  sizes_C: np.ndarray
  order_C: np.ndarray
  rows_R: np.ndarray

  def __len__(self) -> int:
    return len(self.rows_R) - 1

  def take(self, index_B: np.ndarray) -> Batch:
    shape = (len(index_B), self.length)
    inputs_BT, targets_BT, positions_BT, segment_ids_BT = (
      np.zeros(shape, np.int32) for _ in range(4)
    )
    for b, row in enumerate(index_B):
      at = 0
      for segment, cut in enumerate(self._cuts(row), start=1):
        start, size = self.starts_C[cut], self.sizes_C[cut]
        here = slice(at, at + size)
        inputs_BT[b, here] = self.tokens_S[start : start + size]
        targets_BT[b, here] = self.tokens_S[start + 1 : start + size + 1]
        positions_BT[b, here] = np.arange(size)
        segment_ids_BT[b, here] = segment
        at += size
    return Batch(
      inputs_BT, targets_BT, (segment_ids_BT > 0).astype(np.float32), positions_BT, segment_ids_BT
    )

  def _cuts(self, row: int) -> np.ndarray:
    return (
      self.order_C[self.rows_R[row] : self.rows_R[row + 1]] if row < len(self) else self.order_C[:0]
    )


def pack(tokens_S: np.ndarray, borders_D: np.ndarray, length: int) -> Packed:
  """Whole documents into rows: the longest first, each into the fullest row that has room (best-fit decreasing).

  A document of n tokens takes n + 1 positions: the inputs are the eos before it and its tokens, the targets its tokens
  and the eos after it. No position is spent on predicting across a border, so all but padding has weight 1. A longer
  document is split into full rows and a rest; each part after the first starts from the last token of the part before
  it, at position 0, and sees nothing earlier.
  """
  starts_C, sizes_C = _cut(borders_D, length)
  order_C = np.argsort(-sizes_C, kind="stable")
  row_C = _best_fit(sizes_C[order_C], length)
  order_C = order_C[np.argsort(row_C, kind="stable")]
  rows_R = np.concatenate([[0], np.cumsum(np.bincount(row_C))])
  return Packed(tokens_S, length, starts_C, sizes_C, order_C, rows_R)


def _cut(borders_D: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Start and size of each document's parts of at most `length` targets."""
  sizes_D = np.diff(borders_D)
  parts_D = -(-sizes_D // length)
  part_C = np.arange(parts_D.sum()) - np.repeat(np.cumsum(parts_D) - parts_D, parts_D)
  starts_C = np.repeat(borders_D[:-1], parts_D) + part_C * length
  return starts_C, np.minimum(np.repeat(borders_D[1:], parts_D) - starts_C, length)


def _best_fit(sizes_C: np.ndarray, length: int) -> np.ndarray:
  """The row of each size: the open row with the least room that suffices, or a new one. O(C log length)."""
  rows_by_room: dict[int, list[int]] = {}
  rooms: list[int] = []  # the keys of rows_by_room, sorted
  rows, count = np.empty(len(sizes_C), np.int64), 0
  for c, size in enumerate(sizes_C.tolist()):
    at = bisect.bisect_left(rooms, size)
    if at == len(rooms):
      row, room, count = count, length, count + 1
    else:
      room = rooms[at]
      row = rows_by_room[room].pop()
      if not rows_by_room[room]:
        del rows_by_room[room], rooms[at]
    rows[c] = row
    if room := room - size:
      if room not in rows_by_room:
        rows_by_room[room] = []
        bisect.insort(rooms, room)
      rows_by_room[room].append(row)
  return rows
