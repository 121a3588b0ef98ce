"""Reads files as documents, piece by piece: text, JSON lines (plain, gzip, zstd) and parquet.

A document comes as pieces of at most 32 KiB of UTF-8, so that memory does not grow with a text
file. A record of JSON lines or parquet is held whole while its pieces are read. Every piece carries
the position after it, from which another reader goes on with the same pieces. Every error names the
file and the rule.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from pallas_kernels.common.errors import UserError, import_extra

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ENDINGS = TEXT + RECORDS
BLOCK = 1 << 16  # bytes that are read from a file at once
PIECE = 1 << 15  # bytes of the longest piece
CONTEXT = (
  1 << 8
)  # bytes around a piece that a tokenizer sees, so that it finds the whole text's tokens


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
  documents: int = 0
  """Documents read to their end, without the empty ones."""
  empty: int = 0
  """Documents without text, which are left out."""
  replaced: int = 0
  """Invalid byte sequences that became U+FFFD."""
  left_out: tuple[str, ...] = ()
  """Files that were left out, each with the reason."""
  full: bool = False
  """Whether text was left out because of `max_bytes`."""


class Piece(NamedTuple):
  """Holds a part of a document's text."""

  document: str
  """Name of the document."""
  text: str
  start: int
  """Bytes of the document before this piece."""
  last: bool
  """Whether the document ends with this piece."""
  before: str
  """The character before the piece in its document, if there is one."""
  after: Position | None
  """Where reading goes on after this piece; None where more of what was read follows."""


@dataclasses.dataclass
class Reader:
  """Reads files as pieces of documents from a position on, up to `config.max_bytes` of text."""

  config: DataConfig
  position: Position = Position()

  def next_file(self) -> None:
    """Moves the position to the start of the next file."""
    self.position = self.position._replace(file=self.position.file + 1, record=0, offset=0)

  def read(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of one file: one document, or one per record, named `name:0`, `name:1`, ...

    Empty documents are counted and left out. Raises UserError for a file that cannot be read, is
    damaged, is not UTF-8 or holds a NUL byte, and for records without the text field.
    """
    try:
      if path.name.lower().endswith(TEXT):
        if self.position.record == 0:
          with path.open("rb") as file:
            file.seek(max(self.position.offset - 4, 0))  # a character has up to 4 bytes
            before = file.read(self.position.offset - file.tell())
            blocks = iter(lambda: file.read(BLOCK), b"")
            yield from self.document(name, before, blocks, str(path))
      elif path.name.lower().endswith(".parquet"):
        yield from self.parquet(path, name)
      else:
        yield from self.json_lines(path, name)
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

  def document(
    self, name: str, before: bytes, blocks: Iterable[bytes], where: str
  ) -> Iterator[Piece]:
    """Yields the pieces of the document that goes on with these blocks; moves past the record.

    `before` is the end of what precedes the blocks in the document.
    """
    for raw, last in cut_pieces(blocks, PIECE):
      start, size = self.position.offset, self.position.size
      limit = len(raw) if self.config.max_bytes is None else self.config.max_bytes - size
      full = len(raw) > limit
      if full:
        raw, last = raw[: character_border(raw, limit)], True
      text, replaced = self.decode(raw, where)
      self.position = self.position._replace(
        offset=start + len(raw),
        size=size + len(raw),
        replaced=self.position.replaced + replaced,
        full=full,
      )
      if last:
        self.next_record(empty=not start and not raw and not full, ended=bool(start or raw))
      if raw or (start and last):
        yield Piece(name, text, start, last, before.decode(errors="ignore")[-1:], self.position)
      if full:
        return
      before = raw[-4:]

  def next_record(self, *, empty: bool = False, ended: bool = False) -> None:
    """Moves to the next record; counts the one before as an empty or ended document."""
    at = self.position
    self.position = at._replace(
      record=at.record + 1, offset=0, documents=at.documents + ended, empty=at.empty + empty
    )

  def decode(self, raw: bytes, where: str) -> tuple[str, int]:
    """Returns the text of UTF-8 bytes and how many invalid sequences of it were replaced.

    Raises UserError that names `where` and the byte of a NUL or of what is not UTF-8.
    """
    offset = self.position.offset
    if (nul := raw.find(0)) >= 0:
      rule = "a binary file, or not UTF-8; text holds no NUL"
      raise UserError(f"{where}: NUL at byte {offset + nul}: {rule}")
    try:
      return raw.decode(), 0
    except UnicodeDecodeError as error:
      if self.config.invalid_utf8 == "error":
        way_on = "data.invalid_utf8='replace' reads it with U+FFFD in such places"
        place = f"byte {offset + error.start} is not UTF-8"
        raise UserError(f"{where}: {place}: text must be UTF-8 ({way_on})") from error
    text = raw.decode(errors="replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())

  def record(self, name: str, value: Any, where: str) -> Iterator[Piece]:
    """Yields the pieces of a record's text field, given as str or as the bytes of one."""
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: `decode` judges it.
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    if not isinstance(raw, bytes):
      field = f"field {self.config.text_field!r} (data.text_field)"
      raise UserError(f"{where}: {field} is {type(value).__name__}, must be text")
    offset = self.position.offset
    before = raw[max(offset - 4, 0) : offset]
    yield from self.document(name, before, [raw[offset:]], where)

  def json_lines(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of a file that holds one object per line."""
    for index, line in enumerate(_lines(path)):
      if index < self.position.record:
        continue
      where = f"{path}:{index + 1}"
      text = _whole_line(self, line, where)
      if not text.strip():
        self.next_record()
        continue
      try:
        record = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}; every line holds one object") from error
      if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}; every line holds one object")
      if self.config.text_field not in record:
        raise missing_field(where, self.config.text_field, list(record))
      yield from self.record(f"{name}:{index}", record[self.config.text_field], where)
      if self.position.full:
        return

  def parquet(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of a parquet file, of which one row group at a time is read."""
    purpose = f"{path}: reading .parquet"
    arrow = import_extra("pyarrow", "data", purpose)
    parquet = import_extra("pyarrow.parquet", "data", purpose)
    field = self.config.text_field
    try:
      # A buffer makes arrow read pages one after another instead of whole row groups.
      with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if field not in file.schema_arrow.names:
          raise missing_field(str(path), field, file.schema_arrow.names)
        index = 0
        for group in range(file.num_row_groups):
          rows = file.metadata.row_group(group).num_rows
          if index + rows <= self.position.record:  # read before the position
            index += rows
            continue
          for batch in file.iter_batches(batch_size=128, row_groups=[group], columns=[field]):
            # As bytes, because nothing makes sure that the strings of a parquet file are UTF-8.
            for raw in batch.column(0).cast(arrow.large_binary()).to_pylist():
              if index >= self.position.record:
                yield from self.record(f"{name}:{index}", raw, f"{path}:{index}")
              if self.position.full:
                return
              index += 1
    except arrow.ArrowNotImplementedError as error:
      rule = f"column {field!r} (data.text_field) must be text"
      raise UserError(f"{path}: {rule}: {error}") from error
    except arrow.ArrowException as error:
      raise UserError(f"{path}: damaged parquet: {error}") from error


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


def missing_field(where: str, field: str, fields: list[str]) -> UserError:
  """Returns the error for a record without its text field."""
  others = ", ".join(fields) or "none"
  return UserError(f"{where}: no field {field!r} (data.text_field); there are: {others}")


def _whole_line(reader: Reader, line: bytes, where: str) -> str:
  """Returns the text of a line of JSON; counts invalid bytes once, wherever reading began."""
  position = reader.position
  reader.position = position._replace(offset=0)
  text, replaced = reader.decode(line, where)
  counted = position.replaced + replaced * (position.offset == 0)
  reader.position = position._replace(replaced=counted)
  return text


def _lines(path: Path) -> Iterator[bytes]:
  ending = path.name.lower()
  if ending.endswith(".zst"):
    yield from _zstd_lines(path)
  elif ending.endswith(".gz"):
    try:
      with gzip.open(path, "rb") as lines:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise UserError(f"{path}: truncated or damaged gzip: {error}") from error
  else:
    with path.open("rb") as file:
      yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
  zstandard = import_extra("zstandard", "data", f"{path}: reading .zst")
  # Frame by frame, because zstandard's own stream reader takes a truncated file for a whole one.
  decoder, rest = zstandard.ZstdDecompressor().decompressobj(), b""
  try:
    with path.open("rb") as file:
      while chunk := file.read(BLOCK):
        while chunk:
          if decoder.eof:
            decoder = zstandard.ZstdDecompressor().decompressobj()
          *lines, rest = (rest + decoder.decompress(chunk)).split(b"\n")
          yield from lines
          chunk = decoder.unused_data
  except zstandard.ZstdError as error:
    raise UserError(f"{path}: damaged zstd: {error}") from error
  if not decoder.eof:
    raise UserError(f"{path}: truncated zstd: the last frame does not end")
  if rest:
    yield rest
