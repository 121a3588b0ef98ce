"""Cuts a stream of tokens into rows for training and evaluation.

The stream is eos, document, eos, document, ..., eos, so that the first token of a document is
predicted too, from the eos before it. A row predicts a span of the stream from the tokens one place
earlier:

  windows  spans of `length` tokens one after another, whatever documents they touch
  packed   whole documents side by side in a row; segments keep attention and positions apart

Either way each token but the first eos is the target of exactly one position. Rows hold no tokens:
they read theirs from a token store when they are built. `windows` needs no memory. `packed` holds
about 32 bytes per document, 60 while the rows are made, which takes 1 to 3 seconds per million
documents.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorstore as ts

from jaxlm.data.arrays import read_spans

# B rows of a batch, T positions of a row, S tokens of the stream, D documents, C rests of
# documents, R rows of rests


class Batch(NamedTuple):
  """Holds rows of numpy arrays, or of jax arrays once they are on the devices."""

  inputs_BT: Any
  """int32"""
  targets_BT: Any
  """int32, the token after each input"""
  weights_BT: Any
  """float32, 1 where the target counts and 0 where there is padding"""
  positions_BT: Any | None = None
  """int32, 0, 1, ... along each segment; None where rows are single segments"""
  segment_ids_BT: Any | None = None
  """int32, 1, 2, ... along the row and 0 for padding, each in one piece; None where rows are single
  segments"""


class Rows(Protocol):
  """Builds batches of rows of a text; rows are named by their index."""

  def __len__(self) -> int: ...

  def build(self, index_B: np.ndarray) -> Batch:
    """Builds these rows; an index past the end gives a row of padding (all weights 0)."""


def join(
  documents: Iterable[np.ndarray], eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the stream of all documents, of `dtype`, and the places of its D + 1 eos, int64."""
  end = np.array([eos], dtype)
  parts, sizes = [end], [0]
  for document in documents:
    parts += [document, end]
    sizes.append(len(document) + 1)
  return np.concatenate(parts, dtype=dtype), np.cumsum(sizes)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Predicts tokens r * length + 1 to (r + 1) * length of the first `size` of a stream in row r."""

  tokens_S: ts.TensorStore
  size: int
  length: int

  def __len__(self) -> int:
    return -(-(self.size - 1) // self.length)

  def build(self, index_B: np.ndarray) -> Batch:
    """Builds these rows, each from its span of the stream."""
    starts_B = np.asarray(index_B, np.int64) * self.length
    sizes_B = np.clip(self.size - starts_B, 0, self.length + 1)
    row_BX = np.zeros((len(starts_B), self.length + 1), np.int32)  # X = T + 1
    # A row past the end reads its first token from within the stream.
    spans = read_spans(self.tokens_S, np.minimum(starts_B, self.size), sizes_B)
    for row_X, span in zip(row_BX, spans):
      row_X[: len(span)] = span
    weights_BT = (np.arange(1, self.length + 1) < sizes_B[:, None]).astype(np.float32)
    return Batch(row_BX[:, :-1], row_BX[:, 1:], weights_BT)


def windows(
  tokens_S: np.ndarray | ts.TensorStore, length: int, *, keep_last: bool = False
) -> Windows:
  """Returns rows of `length` targets; the last, incomplete one is dropped, or padded."""
  tokens_S = _as_store(tokens_S)
  size = tokens_S.shape[0]
  return Windows(tokens_S, size if keep_last else (size - 1) // length * length + 1, length)


def _as_store(tokens_S: np.ndarray | ts.TensorStore) -> ts.TensorStore:
  return ts.array(tokens_S) if isinstance(tokens_S, np.ndarray) else tokens_S


@dataclasses.dataclass(frozen=True)
class Packed:
  """Packs whole documents into rows: full rows of long ones, then rows where rests stand together.

  Row r below F, the last of `full_D`, is one of the full rows of the document d for which r lies
  between full_D[d - 1] and full_D[d]. Row F + r holds the rests rows_R[r] to rows_R[r + 1], each
  of which is `sizes_C` targets from stream place `starts_C` on.
  """

  tokens_S: ts.TensorStore
  length: int
  borders_D: np.ndarray
  full_D: np.ndarray
  starts_C: np.ndarray
  sizes_C: np.ndarray
  rows_R: np.ndarray

  def __len__(self) -> int:
    return int(self.full_D[-1]) + len(self.rows_R) - 1

  def build(self, index_B: np.ndarray) -> Batch:
    """Builds these rows, with the segment and position of each target."""
    shape = (len(index_B), self.length)
    inputs_BT = np.zeros(shape, np.int32)
    targets_BT = np.zeros(shape, np.int32)
    positions_BT = np.zeros(shape, np.int32)
    segment_ids_BT = np.zeros(shape, np.int32)
    starts, sizes = zip(*map(self._spans, index_B))
    spans = iter(read_spans(self.tokens_S, np.concatenate(starts), np.concatenate(sizes) + 1))
    for b, sizes_of_row in enumerate(sizes):
      start = 0
      for segment, size in enumerate(sizes_of_row, start=1):
        here, span = slice(start, start + size), next(spans)
        inputs_BT[b, here] = span[:-1]
        targets_BT[b, here] = span[1:]
        positions_BT[b, here] = np.arange(size)
        segment_ids_BT[b, here] = segment
        start += size
    weights_BT = (segment_ids_BT > 0).astype(np.float32)
    return Batch(inputs_BT, targets_BT, weights_BT, positions_BT, segment_ids_BT)

  def _spans(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where in the stream a row's segments start, and how many targets each has."""
    if row < self.full_D[-1]:
      d = np.searchsorted(self.full_D, row, side="right")
      before = self.full_D[d - 1] if d else 0
      start = self.borders_D[d] + (row - before) * self.length
      return np.array([start]), np.array([self.length])
    row -= self.full_D[-1]
    rests = slice(*self.rows_R[row : row + 2]) if row < len(self.rows_R) - 1 else slice(0)
    return self.starts_C[rests], self.sizes_C[rests]


def pack(tokens_S: np.ndarray | ts.TensorStore, borders_D: np.ndarray, length: int) -> Packed:
  """Packs whole documents into rows: the longest first, each into the fullest row that has room.

  This is best-fit decreasing. A document of n tokens takes n + 1 positions: the inputs are the eos
  before it and its tokens, the targets its tokens and the eos after it. No position is spent on
  predicting across a border, so all but padding has weight 1. A longer document is split into full
  rows and a rest; each part after the first starts from the last token of the part before it, at
  position 0, and sees nothing earlier.
  """
  sizes_D = np.diff(borders_D)
  full_D = np.cumsum(sizes_D // length)
  rest_D = (sizes_D % length).astype(np.int32)
  order_C = np.argsort(-rest_D, kind="stable")[: np.count_nonzero(rest_D)]
  row_C = _best_fit(rest_D[order_C], length)
  order_C = order_C[np.argsort(row_C, kind="stable")]
  rows_R = np.concatenate([[0], np.cumsum(np.bincount(row_C))])
  sizes_C = rest_D[order_C]
  starts_C = borders_D[1:][order_C] - sizes_C
  return Packed(_as_store(tokens_S), length, borders_D, full_D, starts_C, sizes_C, rows_R)


def _best_fit(sizes_C: np.ndarray, length: int) -> np.ndarray:
  """Returns the row of each size: the open row with the least room that suffices, or a new one.

  Takes O(C log length) steps.
  """
  rows_by_room: dict[int, list[int]] = {}
  rooms: list[int] = []  # the keys of rows_by_room, sorted
  rows, count = np.empty(len(sizes_C), np.int32), 0
  for c, size in enumerate(_as_ints(sizes_C)):
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


def _as_ints(values: np.ndarray) -> Iterator[int]:
  """Yields the values as Python's integers, of which it never holds many."""
  for start in range(0, len(values), 1 << 16):
    yield from values[start : start + (1 << 16)].tolist()
