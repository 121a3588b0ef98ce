"""Reads the bytes of text files: decompressed, as UTF-8 whatever their byte-order mark says.

What is not text, or damaged, raises a `Fault`, which says what the file is.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxlm.data.placeholder import HEAD, HTML_PAGES, find_placeholder
from pallas_kernels.common.errors import import_extra

TEXT = (".txt", ".md", ".py")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 1 << 16  # bytes that are read from a file at once
ZSTD_BLOCK = 1 << 8  # of a compressed file: 4 bytes of zstd can stand for 128 KiB
DAMAGED = "damaged files"
WITH_NUL = "texts with a NUL"

MARKS = (  # those of UTF-32 first: the one of UTF-16 is the start of one of them
  (codecs.BOM_UTF32_LE, "utf-32-le"),
  (codecs.BOM_UTF32_BE, "utf-32-be"),
  (codecs.BOM_UTF16_LE, "utf-16-le"),
  (codecs.BOM_UTF16_BE, "utf-16-be"),
  (codecs.BOM_UTF8, "utf-8"),
)
COMPRESSED_HEADS = {
  b"\x1f\x8b": "compressed by gzip: its name must end in .gz",
  b"\x28\xb5\x2f\xfd": "compressed by zstd: its name must end in .zst",
}
OTHER_HEADS = {
  b"PAR1": "a parquet file: its name must end in .parquet",
  b"PK\x03\x04": "a zip archive, to be unpacked first",
  b"%PDF-": "a PDF document",
}


class Fault(Exception):
  """Says why a file or record is no text: `kind` in the plural, `message` with its name."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind, self.message = kind, message


def check_is_text(path: Path) -> None:
  """Raises Fault for a file that its first bytes show to be something else than its name says."""
  with path.open("rb") as file:
    head = file.read(HEAD)
  packed = path.name.lower().endswith((*COMPRESSIONS, ".parquet"))
  placeholder = find_placeholder(head)
  if placeholder and (head or packed):  # an empty text is a text
    hint = " (to train on such pages, put them into jsonl)"
    hint = hint if placeholder.kind == HTML_PAGES else ""
    raise Fault(placeholder.kind, f"{path}: {placeholder.description}{hint}")
  heads = {} if packed else COMPRESSED_HEADS | OTHER_HEADS
  for prefix, what in heads.items():
    if head.startswith(prefix):
      raise Fault("files of another kind than their name says", f"{path}: {what}")


def text_blocks(path: Path, start: int = 0) -> Iterator[bytes]:
  """Yields the text of a file from byte `start` of its UTF-8 on, without its byte-order mark.

  What is invalid in UTF-16 or UTF-32 becomes invalid UTF-8. Raises Fault for damaged compression.
  """
  head = b""
  for block in _decompressed(path, 0):
    head += block[:4]
    if len(head) >= 4:
      break
  mark, encoding = next((entry for entry in MARKS if head.startswith(entry[0])), (b"", "utf-8"))
  if encoding == "utf-8":
    yield from _decompressed(path, len(mark) + start)
  else:
    yield from _skip(_as_utf8(_decompressed(path, len(mark)), encoding), start)


def _skip(blocks: Iterable[bytes], count: int) -> Iterator[bytes]:
  for block in blocks:
    if count < len(block):
      yield block[count:]
    count = max(count - len(block), 0)


def _as_utf8(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
  decoder = codecs.getincrementaldecoder(encoding)("jaxlm_half_a_pair")
  for block in blocks:
    yield decoder.decode(block).encode("utf-8", "surrogatepass")
  yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


def _half_a_pair(error: UnicodeError) -> tuple[str, int]:
  """Puts half a surrogate pair, which no UTF-8 holds, in the place of what is invalid."""
  assert isinstance(error, UnicodeDecodeError)
  return "\ud800", error.end


codecs.register_error("jaxlm_half_a_pair", _half_a_pair)


def _decompressed(path: Path, start: int) -> Iterator[bytes]:
  """Yields the bytes of a file from `start` on, of a compressed one those of its content."""
  name = path.name.lower()
  if name.endswith(".zst"):
    yield from _skip(_zstd_blocks(path), start)
  elif name.endswith(".gz"):
    try:
      with gzip.open(path, "rb") as file:
        # read1 gives what stands before a damage, read raises without it
        yield from _skip(iter(lambda: file.read1(BLOCK), b""), start)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise Fault(DAMAGED, f"{path}: truncated or damaged gzip: {error}") from error
  else:
    with path.open("rb") as file:
      file.seek(start)
      yield from iter(lambda: file.read(BLOCK), b"")


def _zstd_blocks(path: Path) -> Iterator[bytes]:
  zstandard = import_extra("zstandard", "data", f"{path}: reading .zst")
  # Frame by frame, because zstandard's own stream reader takes a truncated file for a whole one.
  decoder = zstandard.ZstdDecompressor().decompressobj()
  try:
    with path.open("rb") as file:
      while chunk := file.read(ZSTD_BLOCK):
        while chunk:
          if decoder.eof:
            decoder = zstandard.ZstdDecompressor().decompressobj()
          yield decoder.decompress(chunk)
          chunk = decoder.unused_data
  except zstandard.ZstdError as error:
    raise Fault(DAMAGED, f"{path}: damaged zstd: {error}") from error
  if not decoder.eof:
    raise Fault(DAMAGED, f"{path}: truncated zstd: the last frame does not end")


def cut_lines(blocks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
  """Yields each line without its break; None in place of one of more than `limit` bytes.

  Memory does not grow with the longest line.
  """
  parts, size = list[bytes](), 0
  for block in blocks:
    *ends, rest = block.split(b"\n")
    for end in ends:
      yield b"".join([*parts, end]) if size + len(end) <= limit else None
      parts, size = [], 0
    size += len(rest)
    if size > limit:
      parts = []
    elif rest:
      parts.append(rest)
  if size:
    yield b"".join(parts) if size <= limit else None


def first_fault(blocks: Iterable[bytes], name: str, *, allow_invalid: bool) -> Fault | None:
  """Returns what keeps bytes from being text: a NUL, or what is not UTF-8 unless that is allowed.

  Begins with `name` and says at which byte it is.
  """
  decoder = codecs.getincrementaldecoder("utf-8")()
  offset = 0
  for block in itertools.chain(filter(None, blocks), [b""]):
    if (nul := block.find(0)) >= 0:
      return Fault(WITH_NUL, f"{name}: NUL at byte {offset + nul}: text holds no NUL")
    if not allow_invalid:
      pending = len(decoder.getstate()[0])
      try:
        decoder.decode(block, final=not block)
      except UnicodeDecodeError as error:
        place = offset - pending + error.start
        rule = "text must be UTF-8 (data.invalid_utf8='replace' reads it with U+FFFD there)"
        return Fault("texts that are not UTF-8", f"{name}: byte {place} is not UTF-8: {rule}")
    offset += len(block)
  return None
