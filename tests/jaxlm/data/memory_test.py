"""Memory does not grow with the corpus, neither in tokenizing it nor in training on it."""

import gzip
import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxlm.data.arrays import Place
from jaxlm.data.store import TokenStore

LARGE = 160  # MB
ALLOWED = 60  # MB more than a text of 1 MB takes

TOKENIZE = """
import pathlib, sys
from jaxlm.config import DataConfig
from jaxlm.data.tokenize import tokenize
tokenize(DataConfig(source=sys.argv[1]), pathlib.Path(sys.argv[2]))
"""
LOAD = """
import sys
from jaxlm.config import DataConfig
from jaxlm.data import store
store.CACHE = 1 << 23
from jaxlm.data.loader import load_text, train_loader
text = load_text(DataConfig(source=sys.argv[2], length=256, layout=sys.argv[3]))
batches = train_loader(text, batch=256, seed=0)
for _ in range(150):
  next(batches)
"""
# Not getrusage, whose maximum is inherited from the process that started this one.
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(code, *arguments):
  """The most memory that a process had at once, in MB."""
  command = [sys.executable, "-c", code + PEAK, *map(str, arguments)]
  return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """Texts of 1 MB and of LARGE, with documents of many sizes, and the folders of their stores."""
  folder = tmp_path_factory.mktemp("memory")
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(999)]
  lines = [
    json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(1, 900)))}) for _ in range(400)
  ]
  block = "\n".join(lines) + "\n"
  for name, size in (("small", 1), ("large", LARGE)):
    with open(folder / f"{name}.jsonl", "w") as file:
      for _ in range(max(size * 10**6 // len(block), 1)):
        file.write(block)
  return {name: (folder / f"{name}.jsonl", folder / name) for name in ("small", "large")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_whatever_the_size_of_the_corpus(places):
  writing = {name: peak(TOKENIZE, *places[name]) for name in places}
  assert writing["large"] - writing["small"] < ALLOWED, writing
  for layout in ("windows", "packed"):
    reading = {name: peak(LOAD, *places[name], layout) for name in places}
    assert reading["large"] - reading["small"] < ALLOWED, (layout, reading)


RECORD = 100  # MB


def write_huge_record(path):
  """Writes good records round one of RECORD MB, more than ALLOWED."""
  good = json.dumps({"text": "some good text " * 9})
  if path.name.endswith(".parquet"):
    texts = [good, "a huge record " * (RECORD * 10**6 // 14), good]
    writer = pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())]))
    with writer:
      for text in texts:
        writer.write_table(pyarrow.table({"text": [text]}))
    return
  opened = {".jsonl": open, ".gz": gzip.open, ".zst": zstandard.open}[path.suffix]
  with opened(path, "wb") as file:
    file.write(good.encode() + b'\n{"text": "')
    for _ in range(RECORD):
      file.write(b"a huge record " * (10**6 // 14))
    file.write(b'"}\n' + good.encode())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_is_bounded_whatever_the_size_of_a_record(tmp_path, name):
  """A record above data.record_limit is left out, and those round it are read."""
  write_huge_record(tmp_path / name)
  (tmp_path / "small.jsonl").write_text(json.dumps({"text": "some good text " * 9}))
  small = peak(TOKENIZE, tmp_path / "small.jsonl", tmp_path / "small")
  assert peak(TOKENIZE, tmp_path / name, tmp_path / "store") - small < ALLOWED
  report = TokenStore.open(Place(tmp_path / "store")).report
  assert "2 documents" in report
  assert "left out records longer than data.record_limit: 1 (" in report and "33554432" in report
