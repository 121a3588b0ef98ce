"""Decides which text trains and which is held out for evaluation, by bytes.

Held out are whole documents, chosen by a hash of their names, so that most keep their side when
others come or go. Where those are not near the asked fraction of the bytes, because documents are
few or of very different sizes, the ends of some documents are held out as well. What has to be
known of all documents for that is counted while they are read: where the first rule turns out
wrong, the text is read again under a better one. A source that names its sides is not split.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxlm.data.pieces import Piece, Side, character_border

TOLERANCE = 0.1  # of the asked fraction
LARGE = 1 / 8  # of the text: larger documents are on both sides, each with its end held out
LISTED = 1024  # documents whose sizes are kept one by one: the largest
BINS = 4096  # of places in [0, 1), for the sizes of the others
CHARACTER = 4  # bytes of the longest character: a document of more has two
NEAR = 1 << 15  # bytes between a cut and the border that it is moved to, at most
BORDERS = tuple(map(re.compile, (rb"\n", rb"[.!?] |\xe3\x80\x82", rb"\s")))
"""Where text is cut: behind a line, a sentence (U+3002 is the Chinese full stop), or a space."""


class Cut(NamedTuple):
  """Cuts a document, whose end is held out."""

  document: str
  place: int
  """Bytes of the document that train."""
  size: int
  """Bytes of the document."""


class Split(NamedTuple):
  """Gives every document its side, or its two parts theirs."""

  border: float
  """Documents whose place is below this are held out."""
  cuts: tuple[Cut, ...] = ()
  """The documents that are on both sides, whatever their place."""

  @classmethod
  def parse(cls, border: float, cuts: list[list[Any]]) -> Split:
    """Returns a split from its form in JSON."""
    return cls(border, tuple(Cut(*cut) for cut in cuts))


class Survey:
  """Counts what a split has to know of all documents, in bounded memory."""

  def __init__(
    self,
    listed: Iterable[Iterable[Any]] = (),
    bins: Iterable[int] = (),
    size: int = 0,
    heldout: int = 0,
  ) -> None:
    """Begins anew, or goes on from what `to_json` gave."""
    self.listed: list[tuple[int, str]] = [(size, name) for size, name in listed]
    """Size and name of the largest documents; a heap."""
    self.bins = list(bins) or [0] * BINS
    """Bytes of the others by their place."""
    self.size, self.heldout = size, heldout
    """Bytes of all documents, and of what was held out of them."""

  def to_json(self) -> dict[str, Any]:
    """Returns what `Survey(**values)` goes on from."""
    bins = self.bins if any(self.bins) else []
    return {"listed": self.listed, "bins": bins, "size": self.size, "heldout": self.heldout}

  def add_piece(self, side: Side, piece: Piece) -> None:
    """Counts a piece, and its document with the last one."""
    self.heldout += len(piece.text.encode()) * (side == "heldout")
    if piece.ends:
      self.add(piece.document, piece.end)

  def add(self, document: str, size: int) -> None:
    """Counts a document of `size` bytes."""
    self.size += size
    entry = (size, document)
    if len(self.listed) < LISTED:
      heapq.heappush(self.listed, entry)
    else:
      size, document = heapq.heappushpop(self.listed, entry)
      self.bins[int(place_of(document) * BINS)] += size


def place_of(name: str) -> float:
  """Returns a number in [0, 1) that depends on the name alone."""
  hashed = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
  return (int.from_bytes(hashed) >> 11) / 2**53


class _Unit(NamedTuple):
  """Is one document, or those of a bin, that are held out whole or not at all."""

  border: float
  """The least border under which it is held out."""
  size: int
  document: str = ""
  """Its name; empty for a bin."""


def make_split(survey: Survey, holdout: float) -> Split:
  """Returns the split that holds out `holdout` of the bytes of the surveyed documents.

  The border is the fraction itself, which depends on no other document, where it is near enough.
  """
  target = holdout * survey.size
  divisible = 1 if len(survey.listed) == 1 else CHARACTER
  limit = max(LARGE * survey.size, target, divisible)
  units = [
    _Unit(math.nextafter(place_of(name), 2.0), size, name)
    for size, name in survey.listed
    if size <= limit
  ]
  units += [_Unit((i + 1) / BINS, size) for i, size in enumerate(survey.bins) if size]
  large = sorted((entry for entry in survey.listed if entry[0] > limit), reverse=True)
  cuts = [_cut(name, size, holdout * size) for size, name in large]
  wanted = target - sum(cut.size - cut.place for cut in cuts)
  below = sum(unit.size for unit in units if unit.border <= holdout)
  if below and abs(wanted - below) <= TOLERANCE * target:
    return Split(holdout, tuple(cuts))
  border = 0.0
  for unit in sorted(units):
    if unit.size > wanted:
      heldout = border > 0 or bool(cuts)
      border, more = _at_border(
        unit, border, wanted, TOLERANCE * target, divisible, heldout=heldout
      )
      cuts += more
      break
    border, wanted = unit.border, wanted - unit.size
  return Split(border, tuple(cuts))


def _at_border(
  unit: _Unit, border: float, wanted: float, allowed: float, divisible: int, *, heldout: bool
) -> tuple[float, list[Cut]]:
  """Returns the border before or after a unit that is more than what is wanted, or cuts it.

  Its document is cut where both borders miss by more than `allowed` bytes, if it has more than
  `divisible` bytes. `heldout` says whether anything is held out without the unit.
  """
  if heldout and wanted <= allowed:
    return border, []
  if unit.size - wanted <= allowed:
    return unit.border, []
  if unit.document and unit.size > divisible:
    return border, [_cut(unit.document, unit.size, wanted)]
  return (border if heldout and wanted < unit.size / 2 else unit.border), []


def _cut(document: str, size: int, heldout: float) -> Cut:
  """Cuts a document so that about `heldout` bytes are held out, on both sides at least one."""
  return Cut(document, min(max(size - round(heldout), 1), max(size - 1, 1)), size)


def better_split(split: Split, holdout: float, survey: Survey) -> Split | None:
  """Returns the rule that `split` should have been, given what was read; None if it is right."""
  target = holdout * survey.size
  right = abs(survey.heldout - target) <= TOLERANCE * target
  if right and 0 < survey.heldout < survey.size:
    return None
  better = make_split(survey, holdout)
  return None if better == split or not survey.size else better


def assign_sides(split: Split, pieces: Iterator[Piece]) -> Iterator[tuple[Side, Piece]]:
  """Yields each piece with its side; a piece that a cut falls into is two.

  A cut is moved to the nearest end of a line, else of a sentence, else to a space, at most 32 KiB
  away and a tenth of the shorter part. Where there is none, it falls between two characters.
  """
  cuts = {cut.document: cut for cut in split.cuts}
  side: Side = "train"
  document: str | None = None
  near_cut = list[Piece]()
  for piece in pieces:
    if piece.side:
      yield piece.side, piece
    elif cut := cuts.get(piece.document):
      near = max(1, min(NEAR, int(TOLERANCE * min(cut.place, cut.size - cut.place))))
      if piece.start >= cut.place + near:
        yield "heldout", piece
      elif piece.end <= cut.place - near and not piece.last:
        yield "train", piece
      else:
        near_cut.append(piece)
        if piece.end >= cut.place + near or piece.last:
          yield from _cut_pieces(cut, near, near_cut)
          near_cut = []
    else:
      if piece.document != document:
        document = piece.document
        side = "heldout" if place_of(piece.document) < split.border else "train"
      yield side, piece


def _cut_pieces(cut: Cut, near: int, pieces: list[Piece]) -> Iterator[tuple[Side, Piece]]:
  """Yields the pieces of a document round its cut, which is decided by all of them at once."""
  raw = b"".join(piece.text.encode() for piece in pieces)
  first, last = pieces[0].start, pieces[-1].last
  stop = _find_cut(raw, cut.place - first, near, ends=last)
  start = 0
  for piece in pieces:
    end = start + len(piece.text.encode())
    # Reading goes on only after all of them, where what follows is on one side.
    after = piece.after if piece is pieces[-1] else None
    if end <= stop or stop == len(raw):
      yield "train", piece._replace(after=after, last=piece.last or end == stop)
    elif start >= stop:
      before = "" if start == stop else piece.before
      yield "heldout", piece._replace(after=after, before=before)
    else:
      text, rest = raw[start:stop].decode(), raw[stop:end].decode()
      yield "train", piece._replace(text=text, last=True, after=None, ends=False)
      yield (
        "heldout",
        piece._replace(text=rest, start=first + stop, before="", after=after),
      )
    start = end


def _find_cut(raw: bytes, place: int, near: int, *, ends: bool) -> int:
  """Returns where text is cut: at the border nearest to `place`, else between two characters.

  Leaves something on both sides; `ends` says whether the document ends with the text.
  """
  place = min(place, len(raw) - 1) if ends else place
  first = max(place - near, 0)
  for border in BORDERS:
    stops = [first + match.end() for match in border.finditer(raw[first : place + near])]
    stops = [stop for stop in stops if stop < len(raw) or not ends]
    if stops:
      return min(stops, key=lambda stop: abs(stop - place))
  return character_border(raw, place) or _first_character(raw)


def _first_character(raw: bytes) -> int:
  return next((i for i in range(1, len(raw)) if raw[i] & 0xC0 != 0x80), len(raw))
