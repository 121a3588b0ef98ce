"""Splits text of many shapes, and reads folders with something in them that is no text."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from jaxlm.config import DataConfig
from jaxlm.data.cache import open_text
from pallas_kernels.common.errors import UserError

RECORDS = [{"text": f"record {i}\n", "id": i} for i in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zst(data: bytes) -> bytes:
  """Returns data compressed by zstd in one frame."""
  return zstandard.ZstdCompressor().compress(data)


_sink = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(
  pyarrow.table({"id": [1], "gap": pyarrow.array([None], pyarrow.string())}), _sink
)
PARQUET = _sink.getvalue().to_pybytes()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2471645608\n"


WRONG: list[tuple[str, bytes, str]] = [
  ("a.txt", "text".encode("utf-16-le"), "a.txt: NUL at byte 1: .*binary file, or UTF-16 without"),
  ("a.txt", b"caf\xe9", "a.txt: byte 3 is not UTF-8.*invalid_utf8='replace'"),
  ("a.md", b"caf\xc3", "a.md: byte 3 is not UTF-8"),
  ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: byte 10 is not UTF-8"),
  ("a.jsonl", b'{"text": "\\u0000"}', "a.jsonl:1: NUL at byte 0: text holds no NUL"),
  ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: byte 0 is not UTF-8"),
  ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl:3: not JSON.*every line holds one object"),
  ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
  ("a.jsonl", b'["text"]', "a.jsonl:1: is a list; every line holds one object"),
  ("a.jsonl", b"3", "a.jsonl:1: is a int; every line holds one object"),
  (
    "a.jsonl",
    b'{"body": "a", "id": 1}',
    r"a.jsonl:1: no field 'text' \(data.text_field\); there are: body, id",
  ),
  ("a.jsonl", b"{}", "no field 'text'.*there are: none"),
  ("a.jsonl", b'{"text": null}', "a.jsonl:1: field 'text' .*is null, must be text"),
  ("a.jsonl", b'{"text": 3}', "a.jsonl:1: field 'text' .*is int, must be text"),
  ("a.jsonl", b'{"text": {"text": null}}', "a.jsonl:1: field 'text' .*is dict, must be text"),
  ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "a.jsonl.gz: truncated or damaged gzip"),
  ("a.jsonl.gz", LINES, "a.jsonl.gz: truncated or damaged gzip"),
  (
    "a.jsonl.gz",
    gzip.compress(LINES, mtime=0)[:12] + b"\xff" * 60,
    "a.jsonl.gz: truncated or damaged gzip",
  ),
  ("a.txt.gz", gzip.compress(LINES, mtime=0)[:-20], "a.txt.gz: truncated or damaged gzip"),
  ("a.jsonl.zst", zst(LINES)[:-9], "a.jsonl.zst: truncated zstd"),
  ("a.jsonl.zst", zst(LINES) + zst(LINES)[:-9], "a.jsonl.zst: truncated zstd"),
  ("a.jsonl.zst", LINES, "a.jsonl.zst: damaged zstd"),
  ("a.jsonl.zst", b"", "a.jsonl.zst: an empty file"),
  ("a.parquet", PARQUET, r"a.parquet: no field 'text' \(data.text_field\); there are: id, gap"),
  ("a.parquet", PARQUET[:-9], "a.parquet: damaged parquet"),
  ("a.parquet", b"", "a.parquet: an empty file"),
  ("a.txt", LFS, r"a.txt: a Git LFS pointer \(`git lfs pull` fetches the file\)"),
  ("a.parquet", LFS, "a.parquet: a Git LFS pointer"),
  ("a.jsonl.gz", LFS, "a.jsonl.gz: a Git LFS pointer"),
  ("a.md", b"../.git/annex/objects/x".removeprefix(b"../.git"), "a.md: a git-annex pointer"),
  ("a.txt", b"\n<!DOCTYPE HTML>\n<p>404", "a.txt: an HTML page"),
  ("a.parquet", b"<html><body>Sign in", "a.parquet: an HTML page"),
  ("a.jsonl", b"\xef\xbb\xbf<HTML>", "a.jsonl: an HTML page"),
  ("a.jsonl", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "an error message of a server"),
  ("a.jsonl", gzip.compress(LINES), "a.jsonl: compressed by gzip: its name must end in .gz"),
  ("a.txt", zst(LINES), "a.txt: compressed by zstd: its name must end in .zst"),
  ("a.txt", PARQUET, "a.txt: a parquet file: its name must end in .parquet"),
  ("a.txt", b"PK\x03\x04...", "a.txt: a zip archive"),
  ("a.txt", b"%PDF-1.7", "a.txt: a PDF document"),
]
"""File name, content, and a pattern of what is said of it."""

SHAPES = {
  "one document": lambda rng: [rng.randrange(1_000, 100_000)],
  "2 to 9 of one size": lambda rng: [rng.randrange(1_000, 20_000)] * rng.randrange(2, 10),
  "10 to 100 of one size": lambda rng: [rng.randrange(500, 3_000)] * rng.randrange(10, 101),
  "2 to 100, sizes from 1 to 1000": lambda rng: [
    int(10 ** rng.uniform(2, 5)) for _ in range(rng.randrange(2, 101))
  ],
  "one of 90 % among small ones": lambda rng: [90_000] + [100] * 100,
  "2000 small ones": lambda rng: [rng.randrange(20, 200) for _ in range(2000)],
}


@dataclasses.dataclass(frozen=True)
class SplitCase:
  """Records how a text was split."""

  shape: str
  missed: float
  """The difference of the held-out share and the asked one, as part of the asked one."""
  cut: int
  """Documents on both sides."""
  lost: int
  """Bytes that are on neither side."""


def split_campaign(folder: Path, count: int, seed: int) -> list[SplitCase]:
  """Splits `count` texts of each shape, as files or records, at fractions from 1 % to one half."""
  rng, cases = random.Random(seed), list[SplitCase]()
  for shape, draw in SHAPES.items():
    for index in range(count):
      place = folder / f"{len(cases)}"
      place.mkdir(parents=True)
      texts = [_lines(rng, size) for size in draw(rng)]
      if index % 2:
        records = (json.dumps({"text": text}) + "\n" for text in texts)
        (place / "a.jsonl").write_text("".join(records))
      else:
        for number, text in enumerate(texts):
          (place / f"{number}.txt").write_text(text)
      holdout = 10 ** rng.uniform(-2, -0.302)
      store = open_text(DataConfig(source=str(place), holdout=holdout))
      train, heldout, total = store.train.size, store.heldout.size, sum(map(len, texts))
      missed = abs(heldout / total / holdout - 1)
      cases.append(
        SplitCase(shape, missed, len(store.meta["split"]["cuts"]), total - train - heldout)
      )
  return cases


def _lines(rng: random.Random, size: int) -> str:
  """Returns lines of 5 to 120 characters, `size` together."""
  lines, left = list[str](), size
  while left > 0:
    length = min(rng.randrange(5, 120), left)
    lines.append("a" * (length - 1) + "\n")
    left -= length
  return "".join(lines)


@dataclasses.dataclass(frozen=True)
class WrongCase:
  """Records how a folder was read that holds good text beside something else."""

  said: str
  """The line of the log that names it, without the folder; empty where there is none."""
  good_text_lost: int
  """Bytes of the good text that were not read."""
  refused: bool
  """Whether `data.strict` refuses it."""


def wrong_campaign(folder: Path) -> list[WrongCase]:
  """Reads each content of `WRONG` beside 999 bytes of good text."""
  cases = list[WrongCase]()
  for index, (name, data, _) in enumerate(WRONG):
    place = folder / str(index)
    place.mkdir(parents=True)
    (place / name).write_bytes(data)
    (place / "good.txt").write_text("good text" * 111)
    store = open_text(DataConfig(source=str(place)))
    said = [line for line in store.report.splitlines() if line.startswith("left out ")]
    try:
      open_text(DataConfig(source=str(place), strict=True))
      refused = False
    except UserError:
      refused = True
    lost = max(999 - store.train.size - store.heldout.size, 0)
    cases.append(WrongCase(said[0].replace(f"{place}/", "") if said else "", lost, refused))
  return cases
