"""Decides which documents train and which are held out for evaluation.

A document's side follows from a hash of its name, so that it keeps its side when others come or go.
A single document is split by position. What has to be known about all documents for that is counted
while they are read: where the first rule leaves a side empty, the text is read again under a better
one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxlm.data.formats import Piece, character_border

Side = Literal["train", "heldout"]
SIDES: tuple[Side, Side] = ("train", "heldout")


class Split(NamedTuple):
  """Gives every document, or both parts of a single one, its side."""

  border: float
  """Documents whose place is at most this are held out."""
  size: int | None = None
  """Bytes of the only document, where there is one."""
  cut: int | None = None
  """Bytes of the only document that train; the rest is held out."""


class Places(NamedTuple):
  """Holds what a split has to know of all documents: the extreme places among them."""

  lowest: float = 1.0
  highest: float = -1.0
  second: float = -1.0
  """The highest but one."""

  def add(self, piece: Piece) -> Places:
    """Returns the places with one more document, if the piece is its first."""
    if piece.start:
      return self
    place = place_of(piece.document)
    second = max(self.second, min(self.highest, place))
    return Places(min(self.lowest, place), max(self.highest, place), second)


def place_of(name: str) -> float:
  """Returns a number in [0, 1) that depends on the name alone."""
  hashed = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
  return int.from_bytes(hashed) / 2**64


def first_split(holdout: float, single_size: int | None) -> Split:
  """Returns the rule to begin with; `single_size` is the size of the only document, if known."""
  if single_size is not None and single_size >= 2:
    return _split_by_position(holdout, single_size)
  return Split(holdout)


def better_split(
  split: Split, holdout: float, documents: int, size: int, places: Places
) -> Split | None:
  """Returns the rule that `split` should have been, given what was read; None if it is right."""
  if split.cut is not None or documents == 0:
    return None
  if documents == 1:
    return _split_by_position(holdout, max(size, 2))
  if places.lowest <= split.border < places.highest:
    return None
  # Both sides get at least one document: the border moves to just past the nearest one.
  better = Split(min(max(holdout, places.lowest), places.second))
  return None if better == split else better


def _split_by_position(holdout: float, size: int) -> Split:
  return Split(holdout, size, min(max(round(size * (1 - holdout)), 1), size - 1))


def assign_sides(split: Split, pieces: Iterator[Piece]) -> Iterator[tuple[Side, Piece]]:
  """Yields each piece with its side; the piece that the cut of a single document falls into is two.

  The cut is moved back to a line break if one is near: in the same piece of 32 KiB, and no further
  away than half of the shorter side.
  """
  side: Side = "train"
  document: str | None = None
  for piece in pieces:
    if split.cut is None:
      if piece.document != document:
        document = piece.document
        side = "heldout" if place_of(piece.document) <= split.border else "train"
      yield side, piece
    else:
      yield from _cut_piece(split.cut, split.size or 0, piece)


def _cut_piece(cut: int, size: int, piece: Piece) -> Iterator[tuple[Side, Piece]]:
  raw = piece.text.encode()
  stop = cut - piece.start
  if stop <= 0:
    yield "heldout", piece
  elif stop > len(raw) and not piece.last:
    yield "train", piece
  else:
    near = min(cut, size - cut) // 2
    stop = min(stop, len(raw) - piece.last)
    line_break = raw.rfind(b"\n", max(stop - near, 0), stop) + 1
    stop = line_break or character_border(raw, stop) or _first_character(raw)
    whole = stop == len(raw)
    after = piece.after if whole else None
    yield "train", piece._replace(text=raw[:stop].decode(), last=True, after=after)
    if not whole:
      yield "heldout", piece._replace(text=raw[stop:].decode(), before="")


def _first_character(raw: bytes) -> int:
  return next((i for i in range(1, len(raw)) if raw[i] & 0xC0 != 0x80), len(raw))
