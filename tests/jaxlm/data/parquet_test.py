"""Columns of parquet come as bytes from any row on, but not groups with a page above the limit."""

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data.blocks import Fault
from jaxlm.data.parquet import TooLarge, read_column

TEXTS = ["", None, "a", "bé" * 5] * 30
KINDS = {
  "string": pyarrow.array(TEXTS),
  "large string": pyarrow.array(TEXTS, pyarrow.large_string()),
  "string view": pyarrow.array(TEXTS, pyarrow.string_view()),
  "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
}
OPTIONS = {
  "as usual": {},
  "pages of version 2": {"data_page_version": "2.0"},
  "no dictionary, checksums": {"use_dictionary": False, "write_page_checksum": True},
  "zstd, small pages": {"compression": "zstd", "data_page_size": 20, "write_batch_size": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_come_from_any_place_on(tmp_path, kind, options):
  table = pyarrow.table({"id": range(120), "text": KINDS[kind]})
  path = tmp_path / "a.parquet"
  pyarrow.parquet.write_table(table, path, row_group_size=50, **OPTIONS[options])
  expected = [(row, text if text is None else text.encode()) for row, text in enumerate(TEXTS)]
  for first in (0, 7, 50, 119, 120):
    assert list(read_column(path, "text", 1 << 20, first)) == expected[first:]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_group_with_a_page_above_the_limit_is_not_read(tmp_path, compression):
  texts = ["a", "b", "c", "d" * 5000, "e", "f", "g"]
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"text": texts})
  pyarrow.parquet.write_table(
    table, path, row_group_size=2, compression=compression, use_dictionary=False
  )
  good = [(0, b"a"), (1, b"b"), (4, b"e"), (5, b"f"), (6, b"g")]
  assert list(read_column(path, "text", 4000, 0)) == [*good[:2], (2, TooLarge(2)), *good[2:]]
  assert list(read_column(path, "text", 4000, 3)) == [(3, TooLarge(1)), *good[2:]]
  assert [row for row, _ in read_column(path, "text", 6000, 0)] == list(range(7))


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_damaged_byte_is_a_fault_or_other_text_and_nothing_else(tmp_path, mask):
  path = tmp_path / "a.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
  content = path.read_bytes()
  footer = int.from_bytes(content[-8:-4], "little")  # where arrow itself may abort
  faults = 0
  for place in range(4, len(content) - 8 - footer):
    path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
    try:
      assert len(list(read_column(path, "text", 1 << 20, 0))) <= len(TEXTS)
    except Fault as fault:
      assert "a.parquet" in fault.message
      faults += 1
  assert faults > 3
