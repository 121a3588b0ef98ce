"""Reads the text column of a parquet file in memory that does not grow with the file.

Arrow holds a whole page while it reads the rows in it, and a page holds whole records. The headers
of the pages, which are read first, say how large they are: no group of rows is read that has a page
above the limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxlm.data.blocks import DAMAGED, Fault
from jaxlm.data.records import name_fields
from pallas_kernels.common.errors import import_extra

ROWS = 128  # that are held at once
HELD = 1 << 26  # bytes of them, about


@dataclasses.dataclass(frozen=True)
class TooLarge:
  """Stands for the rows of a group that has a page above the limit."""

  rows: int


def read_column(path: Path, field: str, limit: int, first: int) -> Iterator[tuple[int, Any]]:
  """Yields (row, bytes of its text or None for null) from row `first` on.

  In place of the rows of a group with a page of more than `limit` bytes, yields the first of them
  and their number as `TooLarge`. Raises Fault for a damaged file and a column that is not text, and
  MissingExtraError without pyarrow.
  """
  purpose = f"{path}: reading .parquet"
  arrow = import_extra("pyarrow", "data", purpose)
  parquet = import_extra("pyarrow.parquet", "data", purpose)
  try:
    # A buffer makes arrow read pages one after another instead of whole row groups.
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
      names = file.schema_arrow.names
      if field not in names:
        raise Fault("files without the text field", name_fields(str(path), field, names))
      row = 0
      for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        start, row = row, row + group.num_rows
        if row <= first:
          continue
        page = _largest_page(path, group, field)
        if page > limit:
          yield max(start, first), TooLarge(row - max(start, first))
          continue
        rows = max(1, min(ROWS, HELD // max(page, 1)))
        batches = file.iter_batches(batch_size=rows, row_groups=[index], columns=[field])
        for batch in batches:
          # As bytes, because nothing makes sure that the strings of a parquet file are UTF-8.
          column = batch.column(0)
          if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
          for value in column.cast(arrow.large_binary()):
            if start >= first:
              yield start, value.as_py()
            start += 1
  except (arrow.ArrowNotImplementedError, arrow.ArrowTypeError) as error:
    rule = f"column {field!r} (data.text_field) must be text"
    raise Fault("files whose text field holds no text", f"{path}: {rule}: {error}") from error
  except (arrow.ArrowException, EOFError, OverflowError, RecursionError) as error:
    raise Fault(DAMAGED, f"{path}: damaged parquet: {error}") from error
  except OSError as error:
    if error.errno is not None:  # the operating system's, not arrow's about the content
      raise
    raise Fault(DAMAGED, f"{path}: damaged parquet: {error}") from error


def _largest_page(path: Path, group: Any, field: str) -> int:
  """Returns the bytes of the largest page of a column in a group of rows, uncompressed."""
  largest = 0
  for index in range(group.num_columns):
    column = group.column(index)
    if column.path_in_schema.split(".")[0] != field:
      continue
    start = column.data_page_offset
    if column.dictionary_page_offset:
      start = min(start, column.dictionary_page_offset)
    with path.open("rb") as file:
      end = start + column.total_compressed_size
      file.seek(start)
      while file.tell() < end:
        header = _read_struct(file)
        size, compressed = header.get(2, -1), header.get(3, -1)
        if size < 0 or not 0 <= compressed <= end - start:
          raise EOFError("a page header has no size")
        largest = max(largest, size)
        file.seek(compressed, 1)
  return largest


# The header of a page is a struct of Apache Thrift's compact protocol (thrift-compact-protocol.md):
# field 2 is its size uncompressed, field 3 compressed (parquet.thrift, PageHeader).


def _read_struct(file: IO[bytes]) -> dict[int, int]:
  """Reads a struct and returns its integers by field."""
  values, field = dict[int, int](), 0
  while (byte := _read_byte(file)) != 0:
    delta, kind = byte >> 4, byte & 15
    field = field + delta if delta else _read_signed(file)
    value = _read_value(file, kind)
    if value is not None:
      values[field] = value
  return values


def _read_value(file: IO[bytes], kind: int) -> int | None:
  """Reads a value of a kind, and returns it where it is an integer of 16 bits or more."""
  if kind in (1, 2):  # a boolean, which is the kind itself
    return None
  if kind in (4, 5, 6):
    return _read_signed(file)
  if kind == 3:
    file.seek(1, 1)
  elif kind == 7:
    file.seek(8, 1)
  elif kind == 8:
    file.seek(_read_unsigned(file), 1)
  elif kind == 12:
    _read_struct(file)
  else:  # lists and maps, which page headers do not have
    raise EOFError(f"a page header has a value of kind {kind}")
  return None


def _read_byte(file: IO[bytes]) -> int:
  if not (byte := file.read(1)):
    raise EOFError("a page header is cut short")
  return byte[0]


def _read_unsigned(file: IO[bytes]) -> int:
  value = shift = 0
  while True:
    byte = _read_byte(file)
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      return value


def _read_signed(file: IO[bytes]) -> int:
  value = _read_unsigned(file)
  return value >> 1 ^ -(value & 1)
