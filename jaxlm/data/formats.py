"""Files to documents: text, JSON lines (plain, gzip, zstd) and parquet. Every fault names the file and the rule."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from pallas_kernels.common.errors import UserError, import_extra

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ENDINGS = TEXT + RECORDS
CHUNK = 1 << 16


class Document(NamedTuple):
  name: str
  text: str


@dataclasses.dataclass
class Reader:
  """Reads documents up to `config.max_bytes` and counts what it met."""

  config: DataConfig
  bytes_read: int = 0
  """UTF-8 bytes of the documents so far"""
  replaced: int = 0
  """invalid byte sequences that became U+FFFD"""
  full: bool = False
  """text was left out because of max_bytes"""

  def read(self, path: Path, name: str) -> Iterator[Document]:
    """The documents of one file, empty ones too: the whole text, or one per record, named `name:0`, `name:1`, ...

    Raises ValueError for a file that cannot be read, is damaged, is not UTF-8 or holds a NUL byte, and for records
    without the text field.
    """
    try:
      if path.name.lower().endswith(TEXT):
        with path.open("rb") as file:
          # One byte more than fits, to know whether some text was left out.
          size = min(path.stat().st_size, self.config.max_bytes - self.bytes_read) + 1
          yield self.document(name, file.read(size), str(path))
      elif path.name.lower().endswith(".parquet"):
        yield from self.parquet(path, name)
      else:
        yield from self.json_lines(path, name)
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

  def document(self, name: str, raw: bytes, where: str) -> Document:
    """The document of these bytes, cut to what max_bytes leaves, which may be nothing."""
    left = self.config.max_bytes - self.bytes_read
    if len(raw) > left:
      while left and raw[left] & 0xC0 == 0x80:  # never cut inside a character
        left -= 1
      raw, self.full = raw[:left], True
    text = self.decode(raw, where)
    self.bytes_read += len(raw)
    return Document(name, text)

  def decode(self, raw: bytes, where: str) -> str:
    """Text of UTF-8 bytes; ValueError names `where` and the byte offset of a NUL or of what is not UTF-8."""
    if (offset := raw.find(0)) >= 0:
      raise UserError(
        f"{where}: NUL at byte {offset}: a binary file, or not UTF-8; text holds no NUL"
      )
    try:
      return raw.decode()
    except UnicodeDecodeError as error:
      if self.config.invalid_utf8 == "error":
        rule = (
          "text must be UTF-8 (data.invalid_utf8='replace' reads it with U+FFFD in such places)"
        )
        raise UserError(f"{where}: byte {error.start} is not UTF-8: {rule}") from error
    text = raw.decode(errors="replace")
    self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
    return text

  def record(self, name: str, value: Any, where: str) -> Document:
    """The document of a record's text field, given as str or as the bytes of one."""
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: "surrogatepass" leaves it to `decode`.
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    if not isinstance(raw, bytes):
      kind = type(value).__name__
      raise UserError(
        f"{where}: field {self.config.text_field!r} (data.text_field) is {kind}, must be text"
      )
    return self.document(name, raw, where)

  def json_lines(self, path: Path, name: str) -> Iterator[Document]:
    for index, line in enumerate(_lines(path)):
      where = f"{path}:{index + 1}"
      text = self.decode(line, where)
      if not text.strip():
        continue
      try:
        record = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}; every line holds one object") from error
      if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}; every line holds one object")
      if self.config.text_field not in record:
        raise no_field(where, self.config.text_field, list(record))
      yield self.record(f"{name}:{index}", record[self.config.text_field], where)

  def parquet(self, path: Path, name: str) -> Iterator[Document]:
    purpose = f"{path}: reading .parquet"
    arrow, parquet = (
      import_extra("pyarrow", "data", purpose),
      import_extra("pyarrow.parquet", "data", purpose),
    )
    field, index = self.config.text_field, 0
    try:
      with parquet.ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
          raise no_field(str(path), field, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
          # As bytes, because nothing makes sure that the strings of a parquet file are UTF-8.
          for raw in batch.column(0).cast(arrow.large_binary()).to_pylist():
            yield self.record(f"{name}:{index}", raw, f"{path}:{index}")
            index += 1
    except arrow.ArrowNotImplementedError as error:
      raise UserError(
        f"{path}: column {field!r} (data.text_field) must be text: {error}"
      ) from error
    except arrow.ArrowException as error:
      raise UserError(f"{path}: damaged parquet: {error}") from error


def no_field(where: str, field: str, there: list[str]) -> UserError:
  """The error for a record without its text field."""
  return UserError(
    f"{where}: no field {field!r} (data.text_field); there are: {', '.join(there) or 'none'}"
  )


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
      while chunk := file.read(CHUNK):
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
