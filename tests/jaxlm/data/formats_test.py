import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxlm.config import DataConfig
from jaxlm.data import blocks, formats
from jaxlm.data.corpus import open_source
from jaxlm.data.formats import Reader

TEXTS = [
  "",
  "a",
  "one line\nand another\r\n\n  an indented one\n" * 3,
  "é€😀" * 9,
  "",
  "b " * 40,
  "",
]
LINES = (
  "\n".join(json.dumps({"text": text}) for text in TEXTS).encode().replace(b"}\n", b"}\n\n", 1)
)


def parquet(path):
  table = pyarrow.table({"text": TEXTS})
  pyarrow.parquet.write_table(table, path, row_group_size=2)


WRITERS = {
  "a.txt": lambda path: path.write_text("".join(TEXTS)),
  "a.jsonl": lambda path: path.write_bytes(LINES),
  "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
  "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
  "a.parquet": parquet,
}


@pytest.fixture
def short_pieces(monkeypatch):
  monkeypatch.setattr(formats, "PIECE", 16)
  monkeypatch.setattr(blocks, "BLOCK", 10)
  monkeypatch.setattr(blocks, "ZSTD_BLOCK", 10)


def read(source, config, position=None):
  reader = Reader(config) if position is None else Reader(config, position)
  return list(source.pieces(reader)), reader.position


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("max_bytes", [None, 200])
def test_reading_goes_on_from_every_position(short_pieces, tmp_path, name, max_bytes):
  for prefix in ("1", "2"):
    WRITERS[name](tmp_path / (prefix + name))
  config = DataConfig(source=str(tmp_path), max_bytes=max_bytes)
  source = open_source(config)
  pieces, end = read(source, config)
  assert len(pieces) > 10 and any(not piece.last for piece in pieces)
  assert end.full == (max_bytes is not None)
  for index, piece in enumerate(pieces):
    assert read(source, config, piece.after) == (pieces[index + 1 :], end)


@pytest.mark.parametrize("name", WRITERS)
def test_pieces_join_to_the_documents_and_the_counts_are_theirs(short_pieces, tmp_path, name):
  WRITERS[name](tmp_path / name)
  config = DataConfig(source=str(tmp_path))
  pieces, end = read(open_source(config), config)
  expected = ["".join(TEXTS)] if name == "a.txt" else [text for text in TEXTS if text]
  assert "".join(piece.text for piece in pieces) == "".join(expected)
  assert sum(piece.last for piece in pieces) == end.documents == len(expected)
  assert end.size == len("".join(TEXTS).encode())
  assert end.empty == (0 if name == "a.txt" else TEXTS.count(""))
  for piece in pieces:
    assert piece.end == piece.start + len(piece.text.encode()) and piece.ends == piece.last
    assert piece.after.offset == (0 if piece.last else piece.end)


def test_replaced_bytes_are_counted_once_wherever_reading_goes_on(short_pieces, tmp_path):
  (tmp_path / "a.jsonl").write_bytes((b'{"text": "\xff' + b"word " * 20 + b'\xff"}\n') * 2)
  config = DataConfig(source=str(tmp_path), invalid_utf8="replace")
  source = open_source(config)
  pieces, end = read(source, config)
  assert (pieces[0].after.replaced, end.replaced) == (2, 4)
  for index, piece in enumerate(pieces):
    assert read(source, config, piece.after) == (pieces[index + 1 :], end)
