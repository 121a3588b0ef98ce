"""Reads files as documents, piece by piece: text, JSON lines and parquet.

A text file is one document; a record of JSON lines or parquet is one, which is held whole while its
pieces are read, and left out where it is longer than `data.record_limit`. A file or record that is
no text is left out and counted, or refused with `data.strict`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.blocks import (
  COMPRESSIONS,
  TEXT,
  WITH_NUL,
  Fault,
  check_is_text,
  cut_lines,
  first_fault,
  text_blocks,
)
from jaxlm.data.parquet import TooLarge, read_column
from jaxlm.data.pieces import PIECE, Piece, Position, Side, character_border, cut_pieces
from jaxlm.data.records import OTHER_FORMS, field_of, parse_object
from pallas_kernels.common.errors import UserError

PACKED_TEXT = tuple(ending + packed for ending in TEXT for packed in ("", *COMPRESSIONS))
JSON_LINES = (".jsonl", *(".jsonl" + packed for packed in COMPRESSIONS))
RECORDS = (*JSON_LINES, ".parquet")
ENDINGS = PACKED_TEXT + RECORDS
KNOWN = f"{' '.join(TEXT)} .jsonl (these also with {' or '.join(COMPRESSIONS)}) .parquet"
HOPELESS = 10_000  # records of another form left out before the first text


@dataclasses.dataclass
class Reader:
  """Reads files as pieces of documents from a position on, up to `config.max_bytes` of text."""

  config: DataConfig
  position: Position = Position()
  side: Side | None = None
  """The side of the split that what is read is named to be on."""

  def next_file(self, *, next_side: bool = False) -> None:
    """Moves the position to the start of the next file, of the other side with `next_side`."""
    self.position = self.position._replace(file=self.position.file + 1, record=0, offset=0)
    if next_side:
      self.position = self.position._replace(full=False, side_start=self.position.size)

  def read(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of one file: one document, or one per record, named `name:0`, `name:1`, ...

    Empty documents are counted. Raises UserError for a file that cannot be read, and with
    `config.strict` for files and records that are no text.
    """
    try:
      if self.position.record == self.position.offset == 0:
        check_is_text(path)
      if path.name.lower().endswith(PACKED_TEXT):
        yield from self.text(path, name)
      elif path.name.lower().endswith(".parquet"):
        yield from self.parquet(path, name)
      else:
        yield from self.json_lines(path, name)
    except Fault as fault:
      self.leave_out(fault)
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

  def leave_out(self, fault: Fault, count: int = 1) -> None:
    """Counts what is left out; raises UserError if the configuration is strict about it.

    Also raises where the first records all have another form, as with a wrong `config.text_field`.
    """
    source, position = self.config.source, self.position
    if self.config.strict and source != "stdlib":  # which has sources in other encodings
      raise UserError(f"{fault.message} (without data.strict it is left out)")
    self.position = position.with_left_out(fault.kind, fault.message, count)
    wrong = sum(entry.number for entry in self.position.left_out if entry.kind in OTHER_FORMS)
    if not position.size and wrong >= HOPELESS:
      rule = f"holds no text so far, {wrong:,} records are of another form, the last"
      raise UserError(f"data.source={source!r}: {rule}: {fault.message}")

  def text(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of a text file, of which nothing is read unless all of it is text."""
    if self.position.record:
      return
    start = self.position.offset
    if not start:
      replace = self.config.invalid_utf8 == "replace"
      if fault := first_fault(text_blocks(path), str(path), allow_invalid=replace):
        if fault.kind == WITH_NUL:
          fault.message += ", it is a binary file, or UTF-16 without its byte-order mark"
        raise fault
    first = max(start - 4, 0)  # a character has up to 4 bytes
    blocks = text_blocks(path, first)
    before = b""
    while len(before) < start - first:
      before += next(blocks)
    rest, before = before[start - first :], before[: start - first]
    try:
      yield from self.document(name, before, itertools.chain([rest], blocks), str(path))
    except Fault as fault:
      raise UserError(f"{fault.message}; it has changed while it was read") from fault

  def document(
    self, name: str, before: bytes, blocks: Iterable[bytes], where: str
  ) -> Iterator[Piece]:
    """Yields the pieces of the document that goes on with these blocks; moves past the record.

    `before` is the end of what precedes the blocks in the document.
    """
    for raw, last in cut_pieces(blocks, PIECE):
      start, size = self.position.offset, self.position.size
      limit = len(raw)
      if self.config.max_bytes is not None:
        limit = self.config.max_bytes - (size - self.position.side_start)
      full = len(raw) > limit
      if full:
        raw, last = raw[: character_border(raw, limit)], True
      text, replaced = self.decode(raw, where)
      self.position = self.position._replace(
        offset=start + len(raw),
        size=size + len(raw),
        replaced=self.position.replaced + replaced,
        full=full,
        stopped=self.position.stopped or full,
      )
      end = start + len(raw)
      if last:
        self.next_record(empty=not end and not full, ended=end > 0)
      if raw or (last and end):
        character = before.decode(errors="ignore")[-1:]
        yield Piece(name, text, start, end, last, character, self.position, last, self.side)
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

    Raises Fault for bytes that are no text.
    """
    try:
      if b"\0" not in raw:
        return raw.decode(), 0
    except UnicodeDecodeError:
      pass
    if fault := first_fault([raw], where, allow_invalid=self.config.invalid_utf8 == "replace"):
      raise fault
    text = raw.decode(errors="replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())

  def record(self, name: str, value: Any, where: str) -> Iterator[Piece]:
    """Yields the pieces of a record's text field, given as str or as the bytes of one."""
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: `decode` judges it.
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    try:
      if not isinstance(raw, bytes):
        field = f"field {self.config.text_field!r} (data.text_field)"
        kind = "null" if raw is None else type(raw).__name__
        rule = f"{field} is {kind}, must be text"
        raise Fault("records whose text field holds no text", f"{where}: {rule}")
      if len(raw) > self.config.record_limit:
        raise self.too_long(where)
      self.decode(raw, where)
    except Fault as fault:
      self.leave_out(fault)
      self.next_record()
      return
    offset = self.position.offset
    before = raw[max(offset - 4, 0) : offset]
    yield from self.document(name, before, [raw[offset:]], where)

  def too_long(self, where: str) -> Fault:
    """Returns the fault of a record that is not held in memory."""
    rule = f"longer than data.record_limit={self.config.record_limit} bytes"
    return Fault("records longer than data.record_limit", f"{where}: {rule}")

  def json_lines(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of a file that holds one object per line."""
    lines = cut_lines(text_blocks(path), self.config.record_limit)
    for index, line in enumerate(lines):
      if index < self.position.record:
        continue
      where = f"{path}:{index + 1}"
      try:
        if line is None:
          raise self.too_long(where)
        text = self.line(line, where)
        if text.strip():
          value = field_of(parse_object(text, where), self.config.text_field, where)
          yield from self.record(f"{name}:{index}", value, where)
        else:
          self.next_record()
      except Fault as fault:
        self.leave_out(fault)
        self.next_record()
      if self.position.full:
        return

  def line(self, raw: bytes, where: str) -> str:
    """Returns the text of a line; counts replaced bytes once, wherever reading began."""
    text, replaced = self.decode(raw, where)
    if not self.position.offset:
      self.position = self.position._replace(replaced=self.position.replaced + replaced)
    return text.lstrip("\ufeff")  # files that each had a byte-order mark may have been joined

  def parquet(self, path: Path, name: str) -> Iterator[Piece]:
    """Yields the rest of a parquet file, of which a few rows are held at a time."""
    config = self.config
    rows = read_column(path, config.text_field, config.record_limit, self.position.record)
    for index, value in rows:
      where = f"{path}:{index}"
      if isinstance(value, TooLarge):
        self.leave_out(self.too_long(f"{where}: among {value.rows} rows"), value.rows)
        self.position = self.position._replace(record=index + value.rows)
        continue
      yield from self.record(f"{name}:{index}", value, where)
      if self.position.full:
        return
