"""Cuts documents into pieces, so that memory does not grow with a document.

A document comes as pieces of at most 32 KiB of UTF-8. Every piece carries the position after it,
from which another reader goes on with the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Side = Literal["train", "heldout"]
SIDES: tuple[Side, Side] = ("train", "heldout")
PIECE = 1 << 15  # bytes of the longest piece


class LeftOut(NamedTuple):
  """Counts what was left out of a text for one reason."""

  kind: str
  """What it is, in the plural: records that are not JSON, say."""
  number: int
  first: str
  """Names the first and says what is wrong with it."""


class Position(NamedTuple):
  """Records how far a source has been read, and what was met on the way."""

  file: int = 0
  """Index of the file in the source's list."""
  record: int = 0
  """Index of the record in the file; a text file is one record."""
  offset: int = 0
  """Bytes of that record already read."""
  size: int = 0
  """Bytes of all documents so far."""
  side_start: int = 0
  """Bytes of all documents before those of the side that is being read, where files name theirs."""
  documents: int = 0
  """Documents read to their end, without the empty ones."""
  empty: int = 0
  """Files and documents without text."""
  replaced: int = 0
  """Invalid byte sequences that became U+FFFD."""
  left_out: tuple[LeftOut, ...] = ()
  """Files and records that are not text."""
  full: bool = False
  """Whether the side that is being read has reached `max_bytes`."""
  stopped: bool = False
  """Whether text was left out because of `max_bytes`."""

  def with_left_out(self, kind: str, first: str, count: int = 1) -> Position:
    """Returns the position with `count` more files or records that were left out."""
    entries = list(self.left_out)
    for index, entry in enumerate(entries):
      if entry.kind == kind:
        entries[index] = entry._replace(number=entry.number + count)
        break
    else:
      entries.append(LeftOut(kind, count, first))
    return self._replace(left_out=tuple(entries))


class Piece(NamedTuple):
  """Holds a part of a document's text."""

  document: str
  """Name of the document."""
  text: str
  start: int
  """Bytes of the document, as read, before this piece."""
  end: int
  """Bytes of the document up to the end of this piece."""
  last: bool
  """Whether the document, or its part on one side of the split, ends with this piece."""
  before: str
  """The character before the piece in its document, if there is one."""
  after: Position | None
  """Where reading goes on after this piece; None where more of what was read follows."""
  ends: bool = False
  """Whether the whole document ends with this piece."""
  side: Side | None = None
  """The side of the split, where the source names it."""


def cut_pieces(blocks: Iterable[bytes], size: int) -> Iterator[tuple[bytes, bool]]:
  """Yields the joined blocks as pieces of at most `size` bytes, at least one; True with the last.

  A piece ends before a line break that follows a letter or digit of ASCII, over which no usual
  tokenizer has a token; without one it ends before another line break, else between two characters.
  Where it ends depends on the bytes from its start on, not on the blocks.
  """
  rest = b""
  for block in blocks:
    rest, start = rest + block, 0
    while len(rest) - start > size:
      stop = _piece_end(rest, start, start + size)
      yield rest[start:stop], False
      start = stop
    rest = rest[start:]
  yield rest, True


def _piece_end(text: bytes, start: int, limit: int) -> int:
  stop, any_line = limit, 0
  while (stop := text.rfind(b"\n", start + 1, stop)) > 0:
    end = stop - text.startswith(b"\r", stop - 1)
    if end > start and text[end - 1 : end].isalnum():
      return end
    any_line = any_line or stop
  return any_line or character_border(text, limit)


def character_border(raw: bytes, stop: int) -> int:
  """Returns the last place up to `stop` that is not inside a character of UTF-8."""
  for place in range(stop, max(stop - 4, -1), -1):
    if place == len(raw) or raw[place] & 0xC0 != 0x80:
      return place
  return stop  # not UTF-8
