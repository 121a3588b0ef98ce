"""Cuts documents into pieces, so that memory does not grow with a document.

A document comes as pieces of about 32 KiB of UTF-8, and of at most 1 MiB. Every piece carries the
position after it, from which another reader goes on with the same pieces.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Side = Literal["train", "heldout"]
SIDES: tuple[Side, Side] = ("train", "heldout")
PIECE = 1 << 15  # bytes of a piece, unless there is no border between words in it


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


def cut_pieces(
  blocks: Iterable[bytes], size: int, longest: int | None = None
) -> Iterator[tuple[bytes, bool]]:
  """Yields the joined blocks as pieces of about `size` bytes; True with the last.

  A piece ends where no usual tokenizer has a token over the border, so that the pieces have the
  tokens of the whole text: at the last such place in `size` bytes, else at the first after them.
  Text without any is cut between two characters after `longest` bytes, by default 32 `size`. Where
  a piece ends depends on the bytes from its start on, not on the blocks.
  """
  longest, rest = longest or 32 * size, b""
  for block in blocks:
    rest, start = rest + block, 0
    while stop := _piece_end(rest, start, size, longest, whole=False):
      yield rest[start:stop], False
      start = stop
    rest = rest[start:]
  start = 0
  while stop := _piece_end(rest, start, size, longest, whole=True):
    yield rest[start:stop], False
    start = stop
  yield rest[start:], True


# Added tokens like <tool> or [INST] may include white space beside them: no border lies there.
_WORD_END = rb"(?:(?<=[!-~])(?<![>\]])|(?<=[\xc3-\xdf][\x80-\xbf])|(?<=[\xe4-\xed][\x80-\xbf]{2}))"
_WORD_START = rb"(?:[!-~]|[\xc3-\xdf]|[\xe4-\xed])"
_ONE_BREAK = (
  rb"(?![<\[])(?:(?<=[!-~]\n)(?<![>\]]\n)|(?<=[\xe3-\xef][\x80-\xbf]{2}\n)(?<!\xe3\x80\x80\n))"
)
# Between words: before a single space, or behind a single line break, with no other white space.
_BORDER = re.compile(rb"%b(?= %b)|%b(?=%b)" % (_WORD_END, _WORD_START, _ONE_BREAK, _WORD_START))
_ANY_BORDER = re.compile(_BORDER.pattern + rb"|(?<=[0-9A-Za-z])(?=\r?\n)")
_AHEAD = 4  # bytes behind a border that the patterns look at, or fewer


def _piece_end(text: bytes, start: int, size: int, longest: int, *, whole: bool) -> int:
  """Returns where the piece that begins at `start` ends; 0 where that takes more text, or is last.

  `whole` says that no text comes after this.
  """
  known = len(text) - start - (0 if whole else _AHEAD)
  if known <= size:
    return 0
  piece = text[start : start + size + _AHEAD]  # the patterns look at nothing before it
  stop = size
  while (stop := piece.rfind(b"\n", 1, stop)) > 0:
    end = stop - piece.startswith(b"\r", stop - 1)
    if end and piece[end - 1 : end].isalnum():
      return start + end
  for width in (1 << 8, 1 << 12, size - 1):
    borders = (match.start() for match in _BORDER.finditer(piece, max(1, size - width)))
    if last := max(itertools.takewhile(lambda place: place <= size, borders), default=0):
      return start + last
  piece = text[start : start + longest + _AHEAD]
  match = _ANY_BORDER.search(piece, size)
  if match and match.start() <= min(known, longest):
    return start + match.start()
  return character_border(text, start + longest) if known > longest else 0


def character_border(raw: bytes, stop: int) -> int:
  """Returns the last place up to `stop` that is not inside a character of UTF-8."""
  for place in range(stop, max(stop - 4, -1), -1):
    if place == len(raw) or raw[place] & 0xC0 != 0x80:
      return place
  return stop  # not UTF-8
