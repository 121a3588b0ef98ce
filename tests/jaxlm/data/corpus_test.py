import gzip
import json
import os
import re
import sys
import sysconfig
import types
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.reliability.texts import LINES, PARQUET, RECORDS, WRONG, zst
from jaxlm.config import DataConfig
from jaxlm.data import formats
from jaxlm.data.arrays import read_blocks
from jaxlm.data.cache import open_text
from jaxlm.data.corpus import open_source
from jaxlm.data.formats import Reader
from jaxlm.data.split import Split, assign_sides


class Document(NamedTuple):
  name: str
  text: str


class Corpus(NamedTuple):
  train: list[Document]
  heldout: list[Document]
  report: str


def read(source, **options):
  """Both sides as documents, read from the source and compared with the tokens of its store."""
  config = DataConfig(source=str(source), **options)
  store = open_text(config)
  documents = {"train": [], "heldout": []}
  split = Split.parse(**store.meta["split"])
  texts = list[str]()
  for side, piece in assign_sides(split, open_source(config).pieces(Reader(config))):
    texts.append(piece.text)
    if piece.last:
      documents[side].append(Document(piece.document, "".join(texts)))
      texts = []
  for side, stored in (("train", store.train), ("heldout", store.heldout)):
    joined = "\0".join(["", *(document.text for document in documents[side]), ""])
    assert b"".join(block.tobytes() for block in read_blocks(stored.tokens)) == joined.encode()
  return Corpus(documents["train"], documents["heldout"], store.report)


def everything(corpus):
  """All documents, those that are on both sides joined again."""
  texts = dict(corpus.train)
  for name, text in corpus.heldout:
    texts[name] = texts.get(name, "") + text
  return sorted(Document(*item) for item in texts.items())


def write_many(folder, count=100):
  for i in range(count):
    (folder / f"{i}.txt").write_text(f"text {i}")


def test_folder_is_read_recursively_by_ending(tmp_path):
  (tmp_path / "b" / "c").mkdir(parents=True)
  (tmp_path / "b" / "c" / "x.PY").write_text("x = 1\r\n", newline="")
  (tmp_path / "b" / "y.md").write_text("# Größe")
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "picture.png").write_bytes(b"\0")
  corpus = read(tmp_path)
  assert everything(corpus) == [("a.txt", "a"), ("b/c/x.PY", "x = 1\r\n"), ("b/y.md", "# Größe")]
  assert "4 files" in corpus.report and "1 empty" in corpus.report and "17 bytes" in corpus.report
  assert "left out files of other endings: 1" in corpus.report


SKIPPABLE = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a zstd frame of metadata


def test_documents_come_in_the_order_of_their_paths(tmp_path):
  for name in ("c", "a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / f"{name}{name}.txt").write_text(name)
  config = DataConfig(source=str(tmp_path))
  names = [piece.document for piece in open_source(config).pieces(Reader(config))]
  assert names == sorted(names) and len(names) == 6
  # So the byte limit keeps the same documents everywhere.
  assert [name for name, _ in everything(read(tmp_path, max_bytes=3))] == [
    "a/x.txt",
    "aa.txt",
    "b/x.txt",
  ]


@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("r.jsonl", LINES),
    ("r.jsonl", LINES.rstrip() + b"\n \n\n"),
    ("r.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ("r.jsonl.zst", zst(LINES)),
    ("r.jsonl.zst", zst(LINES[:100]) + SKIPPABLE + zst(LINES[100:].rstrip())),
  ],
)
def test_json_lines(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  expected = sorted((f"{name}:{i}", record["text"]) for i, record in enumerate(RECORDS))
  assert everything(read(tmp_path / name)) == expected


def test_json_lines_are_numbered_with_the_blank_ones(tmp_path):
  (tmp_path / "r.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "b"}')
  assert everything(read(tmp_path)) == [("r.jsonl:0", "a"), ("r.jsonl:2", "b")]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path, kind):
  texts = [record["text"] for record in RECORDS]
  table = pyarrow.table(
    {"id": range(40), "body": pyarrow.array(texts, pyarrow.string()).cast(kind)}
  )
  pyarrow.parquet.write_table(table, tmp_path / "r.parquet", row_group_size=7)
  corpus = read(tmp_path / "r.parquet", text_field="body")
  assert everything(corpus) == sorted((f"r.parquet:{i}", text) for i, text in enumerate(texts))


def test_standard_library_is_python_without_tests_and_installed_packages():
  corpus = read("stdlib", max_bytes=2**22)
  names = [name for name, _ in corpus.train + corpus.heldout]
  assert "argparse.py" in names and len(names) > 50
  assert not any(
    {"test", "tests", "site-packages", "encodings"} & set(name.split("/")) for name in names
  )
  assert corpus == read("stdlib", max_bytes=2**22)


def test_standard_library_leaves_out_what_is_not_utf8(tmp_path, monkeypatch):
  (tmp_path / "a.py").write_text("a = 1\nb = 2\n")
  (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
  (tmp_path / "_sysconfigdata_x.py").write_text("build = {}")
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  corpus = read("stdlib")
  assert {name for name, _ in everything(corpus)} == {"a.py"}
  assert "latin.py: byte 5" in corpus.report
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
  with pytest.raises(ValueError, match="keeps no sources in .*python311.zip"):
    read("stdlib")


@pytest.mark.parametrize("name", ["r.jsonl", "r.txt"])
@pytest.mark.parametrize("limit", range(1, 12))
def test_max_bytes_cuts_between_characters(tmp_path, name, limit):
  text = "aé€😀z" * 5
  (tmp_path / name).write_text(
    text if name == "r.txt" else json.dumps({"text": text}), encoding="utf-8"
  )
  if limit < 3:
    with pytest.raises(ValueError, match="one character is too short"):
      read(tmp_path, max_bytes=limit)
    return
  (train,), (heldout,) = (corpus := read(tmp_path, max_bytes=limit)).train, corpus.heldout
  got = train.text + heldout.text
  assert text.startswith(got) and limit - 4 < len(got.encode()) <= limit
  assert f"stopped at data.max_bytes={limit}" in corpus.report


def test_max_bytes_stops_between_documents_and_says_so_only_when_text_was_left(tmp_path):
  write_many(tmp_path, 10)  # 6 bytes each
  assert len(everything(corpus := read(tmp_path, max_bytes=30))) == 5 and "stopped" in corpus.report
  assert (
    len(everything(corpus := read(tmp_path, max_bytes=60))) == 10 and "stopped" not in corpus.report
  )


def test_replacing_invalid_utf8_is_counted(tmp_path):
  (tmp_path / "a.txt").write_bytes("a real \ufffd\n".encode() + b"caf\xe9 \xff\n")
  (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "half a pair \\ud800"}\n')
  corpus = read(tmp_path, invalid_utf8="replace")
  assert everything(corpus)[0].text == "a real \ufffd\ncaf\ufffd \ufffd\n"
  assert everything(corpus)[1].text == "caf\ufffd"
  assert "6 invalid UTF-8 sequences replaced" in corpus.report  # the half pair is three bytes


GZIP_EMPTY = gzip.compress(b"", mtime=0)


@pytest.mark.parametrize(("name", "data", "message"), WRONG)
def test_what_is_no_text_is_left_out_and_called_what_it_is_or_refused(
  tmp_path, name, data, message
):
  (tmp_path / name).write_bytes(data)
  write_many(tmp_path, 3)
  report = read(tmp_path).report
  assert re.search(rf"^left out .*: 1 \(.*{message}", report, re.MULTILINE), report
  assert "text 0" in "".join(text for _, text in everything(read(tmp_path)))
  with pytest.raises(ValueError, match=message):
    read(tmp_path, strict=True)


@pytest.mark.parametrize(("name", "data", "message"), WRONG)
def test_a_source_without_any_text_says_what_it_is(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  if any(line in data for line in (b'{"text": "a"}', b"record 1")) or "truncated" in message:
    return  # some of it is text
  with pytest.raises(ValueError, match=rf"data.source='.*holds no text \(1 file.*{message}"):
    read(tmp_path / name)


@pytest.mark.parametrize(
  ("name", "data"), [("a.txt", b""), ("a.jsonl", b"\n"), ("a.jsonl", b""), ("a.txt.gz", GZIP_EMPTY)]
)
def test_empty_text_holds_none_and_is_no_fault(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=r"data.source='.*': holds no text \(1 file"):
    read(tmp_path, strict=True)


def test_odd_names_can_be_printed(tmp_path):
  for name in (b"caf\xe9.txt", b"new\nline.txt", "größe.txt".encode()):
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text("some text " * 9)
  report = read(tmp_path).report
  assert r"new\nline.txt, größe.txt, caf\udce9.txt" in report and report.encode()


def test_unknown_endings(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"text")
  known = r"known are .txt .md .py .jsonl \(these also with .gz or .zst\) .parquet"
  with pytest.raises(ValueError, match=f"unknown ending, {known}"):
    read(tmp_path / "a.bin")
  with pytest.raises(ValueError, match=r"no file ends in .txt .* \(files of other endings: 1\)"):
    read(tmp_path)


def test_records_before_and_after_a_bad_one_are_read(tmp_path):
  bad = b'{"text": null}\n{"text": "\xff"}\nnot json\n{"text": 7}\n{"text": "a\\u0000b"}\n'
  (tmp_path / "a.jsonl").write_bytes(LINES + bad + LINES)
  corpus = read(tmp_path)
  assert len(everything(corpus)) == 2 * len(RECORDS)
  assert "left out records whose text field holds no text: 2 (the first: " in corpus.report
  for kind in ("texts that are not UTF-8", "records that are not JSON", "texts with a NUL"):
    assert f"left out {kind}: 1 (" in corpus.report


def test_a_truncated_file_is_read_as_far_as_it_goes(tmp_path):
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 50, mtime=0)[:-20])
  corpus = read(tmp_path)
  assert len(everything(corpus)) > 1000 and "truncated or damaged gzip" in corpus.report


def test_a_wrong_field_is_noticed_early(tmp_path, monkeypatch):
  lines = LINES.replace(b'"text"', b'"body"') * 30
  (tmp_path / "a.jsonl").write_bytes(lines + LINES)
  assert len(everything(read(tmp_path))) == len(RECORDS)
  monkeypatch.setattr(formats, "HOPELESS", 1000)
  with pytest.raises(ValueError, match="no text so far, 1,000 records .*there are: body"):
    read(tmp_path)
  (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n' * 1200 + LINES)
  assert len(everything(read(tmp_path))) == len(RECORDS)


def test_parquet_rows_without_text_are_left_out(tmp_path):
  texts = ["a", None, "b", None, "", "a\0b"] * 9
  pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
  corpus = read(tmp_path)
  assert [text for _, text in everything(corpus)].count("a") == 9 and len(everything(corpus)) == 18
  assert "left out records whose text field holds no text: 18 (the first" in corpus.report
  assert "left out texts with a NUL: 9 (" in corpus.report and "9 empty documents" in corpus.report


@pytest.mark.parametrize(
  ("field", "message"),
  [("gap", "a.parquet:0: field 'gap' .*null"), ("id", "column 'id' .*must be text")],
)
def test_parquet_columns_that_hold_no_text(tmp_path, field, message):
  (tmp_path / "a.parquet").write_bytes(PARQUET)
  with pytest.raises(ValueError, match=message):
    read(tmp_path, text_field=field)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_byte_order_marks_say_the_encoding_and_are_no_text(tmp_path, encoding, name):
  text = "Größe €😀\n" * 5
  content = text if "txt" in name else "".join(json.dumps({"text": text}) + "\n" for _ in "ab")
  raw = content.encode(encoding)
  (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
  corpus = read(tmp_path)
  documents = [text for _, text in everything(corpus)]
  assert (
    "".join(documents) == text * (1 if "txt" in name else 2) and "left out" not in corpus.report
  )


def test_marks_between_joined_files_and_half_pairs_of_utf16(tmp_path):
  (tmp_path / "a.jsonl").write_bytes((b"\xef\xbb\xbf" + LINES) * 2)
  assert len(everything(read(tmp_path))) == 2 * len(RECORDS)
  broken = "some text".encode("utf-16") + b"\x00\xd8" + "more".encode("utf-16-le") + b"x"
  (tmp_path / "b.txt").write_bytes(broken)
  assert "b.txt: byte 9 is not UTF-8" in read(tmp_path).report
  texts = [text for _, text in everything(read(tmp_path, invalid_utf8="replace"))]
  assert any(text.startswith("some text\ufffd") for text in texts)


def test_missing_and_unreadable_paths(tmp_path, monkeypatch):
  for source in (tmp_path / "nowhere", ""):
    with pytest.raises(ValueError, match=r"data.source='.*no such file or folder"):
      read(source)
  with pytest.raises(ValueError, match="data.source='~nobody-of-this-name/text'"):
    read("~nobody-of-this-name/text")
  (tmp_path / "a.txt").write_text("a")

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(Path, "open", refuse)
  with pytest.raises(ValueError, match="a.txt: cannot be read: Permission denied"):
    read(tmp_path)


@pytest.mark.skipif(
  not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder"
)
def test_unreadable_folder(tmp_path):
  (tmp_path / "closed").mkdir(mode=0)
  with pytest.raises(ValueError, match="closed: cannot be read"):
    read(tmp_path)


@pytest.mark.parametrize(
  ("name", "module", "extra"),
  [
    ("a.parquet", "pyarrow", "data"),
    ("a.jsonl.zst", "zstandard", "data"),
    ("hf:owner/set", "datasets", "hf"),
  ],
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name, module, extra):
  monkeypatch.setitem(sys.modules, module, None)
  (tmp_path / name.partition("/")[0]).write_bytes(b"a")
  with pytest.raises(ImportError, match=rf"needs {module}, .*jaxlm\[{extra}\]"):
    read(name if name.startswith("hf:") else tmp_path / name)


class Records(list):
  """Has the one method of a streamed dataset that is used besides iteration."""

  def skip(self, count):
    return Records(self[count:])


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """Stands in for the two libraries; the network is not ours to test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

  def load_dataset(name, *, split, streaming, revision):
    assert (name, streaming, revision) == ("owner/set", True, "abc123")
    if split != "validation":
      raise ValueError(f"Bad split: {split}")
    return Records({"body": f"record {i}"} for i in range(20))

  api = types.SimpleNamespace(dataset_info=lambda name: types.SimpleNamespace(sha="abc123"))
  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: api))


def test_hub_documents(hub):
  corpus = read("hf:owner/set:validation", text_field="body")
  assert (
    Document("owner/set:validation:7", "record 7") in everything(corpus)
    and len(everything(corpus)) == 20
  )
  assert "revision abc123" in corpus.report
  assert len(everything(read("hf:owner/set:validation", text_field="body", max_bytes=20))) == 3


def test_a_split_of_the_hub_can_be_held_out(hub, tmp_path):
  (tmp_path / "a.txt").write_text("a text to train on\n" * 20)
  corpus = read(tmp_path, heldout="hf:owner/set:validation", text_field="body")
  assert [name for name, _ in corpus.train] == ["a.txt"] and len(corpus.heldout) == 20
  assert "held out hf:owner/set:validation" in corpus.report and "revision abc123" in corpus.report


def test_hub_reading_goes_on_from_every_position(hub):
  config = DataConfig(source="hf:owner/set:validation", text_field="body")
  source = open_source(config)
  pieces = list(source.pieces(Reader(config)))
  for index, piece in enumerate(pieces):
    assert list(source.pieces(Reader(config, piece.after))) == pieces[index + 1 :]


def test_hub_errors(hub):
  with pytest.raises(ValueError, match="data.source='hf:owner/set': Bad split: train"):
    read("hf:owner/set")
  with pytest.raises(
    ValueError,
    match="left out .*: 20 .*hf:owner/set:validation:0: no field 'text' .*there are: body",
  ):
    read("hf:owner/set:validation")
