"""Stores are the same however their writing was cut short, and refused where not whole."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import arrays, blocks, formats, store, tokenize, writing
from jaxlm.data.arrays import Place, read_blocks
from jaxlm.data.cache import open_text
from jaxlm.data.corpus import open_source
from jaxlm.data.store import TokenStore
from jaxlm.data.tokenizer import ByteTokenizer, train_bpe
from pallas_kernels.common.errors import UserError


class Killed(BaseException):
  pass


@pytest.fixture
def small(monkeypatch):
  """Shards of 64 tokens, chunks of 16, pieces of 32 bytes: small text has borders of every kind."""
  monkeypatch.setattr(store, "SHARD", 64)
  monkeypatch.setattr(store, "BORDERS_SHARD", 16)
  monkeypatch.setattr(arrays, "CHUNK", 16)
  monkeypatch.setattr(arrays, "DIGEST_BLOCK", 24)
  monkeypatch.setattr(arrays, "SYNC", False)
  monkeypatch.setattr(formats, "PIECE", 32)
  monkeypatch.setattr(blocks, "BLOCK", 20)


@pytest.fixture
def folder(tmp_path):
  """Six documents of up to 150 bytes, two of them in one file, and one empty file."""
  folder = tmp_path / "text"
  folder.mkdir()
  for i in range(1, 4):
    (folder / f"{i}.txt").write_text(" ".join(f"{i}.{word}" for word in range(20 * i)) + "é\n")
  records = [{"text": f"record {i}\nof a few lines " * 5} for i in range(3)]
  (folder / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
  (folder / "z.txt").write_text("")
  return folder


def files(folder):
  return {
    path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def tokens(side):
  return np.concatenate(list(read_blocks(side.tokens)))


def write(config, target, **options):
  return tokenize.tokenize(config, target, commit_seconds=0, **options)


@pytest.mark.parametrize("source", ["text", "text/3.txt", "text/r.jsonl"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
@pytest.mark.parametrize("kill_at", ["after a commit", "before a commit"])
def test_a_killed_store_goes_on_to_the_same_content(
  small, folder, tmp_path, monkeypatch, source, tokenizer, kill_at
):
  """Killed at every commit in turn, once before and once after the progress is written."""
  config = DataConfig(source=str(folder.parent / source), tokenizer=tokenizer, holdout=0.4)
  commits = []
  whole = write(config, tmp_path / "whole", report=commits.append)
  assert len(commits) > 5 and whole.train.tokens.shape[0] > 64
  countdown, write_json = [0], writing.write_json

  def write_or_die(place, name, value):
    if kill_at == "before a commit" and value["sides"]:
      countdown[0] -= 1
    if countdown[0] < 0:
      raise Killed
    write_json(place, name, value)
    if kill_at == "after a commit" and value["sides"]:
      countdown[0] -= 1
      if countdown[0] < 0:
        raise Killed

  monkeypatch.setattr(writing, "write_json", write_or_die)
  killed = 0
  for attempt in range(1000):
    countdown[0] = 2 * (attempt % 3)  # so that each process gets a little further, or not at all
    try:
      got = write(config, tmp_path / "killed")
      break
    except Killed:
      killed += 1
  assert killed > 1
  assert files(tmp_path / "killed") == files(tmp_path / "whole")
  assert got.digests == whole.digests
  got.check_digests()


def test_the_store_in_memory_is_the_store_on_disk(small, folder, tmp_path):
  config = DataConfig(source=str(folder), holdout=0.4)
  on_disk, in_memory = write(config, tmp_path / "store"), open_text(config)
  assert on_disk.meta == in_memory.meta and in_memory.place == Place()
  for side in ("train", "heldout"):
    a, b = getattr(on_disk, side), getattr(in_memory, side)
    np.testing.assert_array_equal(tokens(a), tokens(b))


def test_digests_identify_tokens_and_borders(small, folder, tmp_path):
  config = DataConfig(source=str(folder), holdout=0.4)
  before = open_text(config).digests
  assert open_text(config).digests == before
  target = folder / "1.txt"
  held_out = "heldout" if "1.0" in tokens_text(open_text(config).heldout) else "train"
  text = target.read_text()
  target.write_text(text.replace("1.7", "1,7"))
  after = open_text(config).digests
  assert [side for side in before if before[side] != after[side]] == [held_out]


def tokens_text(side):
  return tokens(side).tobytes().decode()


def test_digests_do_not_depend_on_shards_or_parts(folder, tmp_path, monkeypatch):
  config = DataConfig(source=str(folder), holdout=0.4)
  before = open_text(config).digests
  monkeypatch.setattr(store, "SHARD", 64)
  monkeypatch.setattr(arrays, "CHUNK", 32)
  monkeypatch.setattr(store, "BORDERS_SHARD", 64)
  monkeypatch.setattr(formats, "PIECE", 20)
  assert open_text(config).digests == before


def flip(path):
  content = bytearray(path.read_bytes())
  content[3] ^= 1
  path.write_bytes(content)


DAMAGES = {
  "no shard": (lambda at: (at / "train/tokens/c/1").unlink(), "train/tokens/c/1 is missing"),
  "cut shard": (lambda at: os.truncate(at / "train/tokens/c/0", 90), "c/0 is missing or cut short"),
  "no borders": (
    lambda at: shutil.rmtree(at / "heldout/borders"),
    "heldout/borders cannot be open",
  ),
  "no end": (
    lambda at: (at / "token_store.json").rename(at / "token_store_progress.json"),
    "unfinished token store",
  ),
  "counts": (
    lambda at: (at / "token_store.json").write_text(
      (at / "token_store.json").read_text().replace('"documents": ', '"documents": 1')
    ),
    "token_store.json is not as it was written",
  ),
  "half": (lambda at: os.truncate(at / "token_store.json", 99), "token_store.json cannot be read"),
  "tokenizer": (
    lambda at: (at / "tokenizer.json").write_text(train_bpe(["abc abd " * 9], 258).model.to_str()),
    "tokenizer.json is not the one",
  ),
  "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "there is no tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unfinished_store_is_refused_by_name(small, folder, tmp_path, damage):
  config = DataConfig(source=str(folder), tokenizer="bpe:270", holdout=0.4)
  at = tmp_path / "store"
  write(config, at)
  spoil, message = DAMAGES[damage]
  spoil(at)
  with pytest.raises(UserError, match=f"{at}.*{message}"):
    open_text(DataConfig(source=str(at), tokenizer="bpe:270"))


@pytest.mark.parametrize("name", ["train/tokens", "heldout/borders", "heldout/text"])
def test_a_flipped_bit_is_an_error_when_it_is_read_and_when_all_is_verified(
  small, folder, tmp_path, name
):
  at = tmp_path / "store"
  write(DataConfig(source=str(folder), holdout=0.4), at).check_digests()
  flip(at / name / "c/0")
  opened = TokenStore.open(Place(at))
  with pytest.raises(UserError, match=f"damaged token store: .*{name}/c/0"):
    opened.check_digests()
  with pytest.raises(UserError, match="damaged token store"):
    list(read_blocks(opened.place.open_array(name)))


def test_other_tokens_under_good_checksums_fail_the_digest(small, folder, tmp_path):
  at = tmp_path / "store"
  opened = write(DataConfig(source=str(folder), holdout=0.4), at)
  opened.place.open_array("train/tokens", open=True)[3:4].write(np.array([7], np.uint8)).result()
  with pytest.raises(UserError, match="the digest of train/tokens is not the one"):
    TokenStore.open(Place(at)).check_digests()


def test_another_tokenizer_than_the_one_asked_for_is_refused(small, folder, tmp_path):
  text = DataConfig(source=str(folder), tokenizer="bpe:270", holdout=0.4)
  at = tmp_path / "store"
  made = write(text, at)
  given = str(at / "tokenizer.json")
  for tokenizer in ("bpe:270", given):
    opened = open_text(DataConfig(source=str(at), tokenizer=tokenizer))
    assert opened.digests == made.digests
  other = train_bpe(["abc abd " * 9], 258)
  other.save(tmp_path)
  for tokenizer in ("bytes", "bpe:271", str(tmp_path / "tokenizer.json")):
    with pytest.raises(
      UserError, match=f"data.tokenizer='{tokenizer}': .*--data.tokenizer {given}"
    ):
      open_text(DataConfig(source=str(at), tokenizer=tokenizer))
  for tokenizer in (other, ByteTokenizer()):
    with pytest.raises(UserError, match="made with another tokenizer"):
      open_text(DataConfig(source=str(at), tokenizer="bpe:270"), tokenizer)
  with pytest.raises(UserError, match=r"data.holdout=0.5: the store .* was made with 0.4"):
    open_text(DataConfig(source=str(at), tokenizer="bpe:270", holdout=0.5))


def test_a_store_of_something_else_is_not_touched(small, folder, tmp_path):
  config = DataConfig(source=str(folder), holdout=0.4)
  at = tmp_path / "store"
  write(config, at)
  before = files(at)
  with pytest.raises(UserError, match="data.holdout=0.5: the store was made with 0.4"):
    write(DataConfig(source=str(folder), holdout=0.5), at)
  (folder / "1.txt").write_text("something else")
  with pytest.raises(UserError, match=f"{at}: was made from another source"):
    write(config, at)
  assert files(at) == before
  with pytest.raises(UserError, match="holds other files"):
    write(config, folder)
  with pytest.raises(UserError, match="is a file"):
    write(config, folder / "2.txt")


def test_an_unfinished_store_does_not_go_on_with_text_that_has_changed(
  small, folder, tmp_path, monkeypatch
):
  config, at = DataConfig(source=str(folder), holdout=0.4), tmp_path / "store"

  def die(line):
    if "MB/s" in line:  # of a commit
      raise Killed

  with pytest.raises(Killed):
    write(config, at, report=die)
  before = files(at)
  assert Path("token_store_progress.json") in before and Path("token_store.json") not in before
  (folder / "1.txt").write_text("something else")
  with pytest.raises(UserError, match=f"{at}: was made from another source"):
    write(config, at)
  assert files(at) == before


@pytest.mark.parametrize("name", ["new", "there"])
def test_a_refused_source_leaves_nothing_behind(small, folder, tmp_path, name):
  (tmp_path / "there").mkdir()
  (folder / "3.txt").write_bytes(b"some good lines\n" * 9 + b"\xff")
  with pytest.raises(UserError, match="3.txt: byte 144 is not UTF-8"):
    write(DataConfig(source=str(folder), tokenizer="bpe:260", strict=True), tmp_path / name)
  assert files(tmp_path / "there") == {} and not (tmp_path / "new").exists()


def test_what_a_disk_refuses_to_read_loses_nothing_of_what_was_written(
  small, folder, tmp_path, monkeypatch
):
  config, at = DataConfig(source=str(folder), holdout=0.4), tmp_path / "store"
  whole, opened = write(config, tmp_path / "whole"), Path.open

  def refuse(path, *arguments, **options):
    if path.name == "r.jsonl":
      raise OSError(5, "Input/output error")
    return opened(path, *arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="r.jsonl: cannot be read: Input/output error"):
      write(config, at)
  assert (at / "train").is_dir()
  reports = []
  assert write(config, at, report=reports.append).digests == whole.digests
  assert any("going on after" in line for line in reports)
  assert files(at) == files(tmp_path / "whole")


def test_text_above_the_limit_goes_to_the_cache_and_is_used_again(
  small, folder, tmp_path, monkeypatch
):
  from jaxlm.data import cache

  monkeypatch.setattr(cache, "IN_MEMORY", 100)
  config = DataConfig(source=str(folder), tokenizer="bpe:270", cache=str(tmp_path / "cache"))
  first = open_text(config)
  assert first.place.folder.parent == tmp_path / "cache"
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*/c/*")}
  again = open_text(config)
  resumed = open_text(config, first.tokenizer)  # as a resumed run opens it
  assert again.place == resumed.place == first.place and again.meta == resumed.meta == first.meta
  assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*/c/*")}
  moved = dataclasses.replace(config, tokenizer="moved.json")  # the run has its own
  assert open_text(moved, first.tokenizer).digests == first.digests
  text, stat = (folder / "1.txt").read_text(), (folder / "1.txt").stat()
  (folder / "1.txt").write_text("something else of another length " * 9)
  assert open_text(config).place != first.place
  (folder / "1.txt").write_text(text)
  os.utime(folder / "1.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert open_text(config).place == first.place
  flip(first.place.folder / "train/tokens/c/0")
  with pytest.raises(UserError, match="damaged token store"):
    open_text(config)


def test_compressed_text_that_is_larger_than_it_looks_goes_to_the_cache(
  folder, tmp_path, monkeypatch
):
  import gzip

  from jaxlm.data import cache

  monkeypatch.setattr(cache, "IN_MEMORY", 1000)
  line = json.dumps({"text": "a" * 500}).encode() + b"\n"
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 20))
  assert (tmp_path / "a.jsonl.gz").stat().st_size < 1000
  config = DataConfig(source=str(tmp_path / "a.jsonl.gz"), cache=str(tmp_path / "cache"))
  assert open_text(config).place.folder is not None


CODE = """
import pathlib, sys
from jaxlm.config import DataConfig
from jaxlm.data.tokenize import tokenize
config = DataConfig(source=sys.argv[1], tokenizer=sys.argv[2], holdout=0.2)
store = tokenize(config, pathlib.Path(sys.argv[3]), report=print, commit_seconds=float(sys.argv[4]))
print(store.digests)
"""


def start(source, tokenizer, at, commit_seconds=0.1):
  command = [sys.executable, "-c", CODE, str(source), tokenizer, str(at), str(commit_seconds)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_is_gone_on_with(tmp_path):
  """SIGKILL at some moment after a start, again and again, until the store is finished."""
  text = tmp_path / "text"
  text.mkdir()
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(999)]
  for i in range(60):
    (text / f"{i}.txt").write_text(" ".join(rng.choices(words, k=9000)))
  assert start(text, "bpe:1000", tmp_path / "whole").wait() == 0
  killed = 0
  while True:
    process = start(text, "bpe:1000", tmp_path / "killed")
    try:
      assert process.wait(timeout=rng.uniform(0, 1 + killed)) == 0
      break
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      killed += 1
  assert killed >= 2
  assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_two_processes_write_one_store_once(folder, tmp_path):
  """The second waits, then finds the store finished."""
  config, at = DataConfig(source=str(folder), holdout=0.2), tmp_path / "store"
  with tokenize._only_writer(Place(at), print):
    other = start(folder, "bytes", at)
    assert "waiting for another process" in other.stdout.readline()
    source = open_source(config)
    plan = tokenize.make_store_plan(config, source, ByteTokenizer())
    mine = writing.StoreWriter(config, source, Place(at), plan, print, 5.0).run(ByteTokenizer())
    time.sleep(0.2)
    assert other.poll() is None
  out = other.communicate()[0]
  assert other.returncode == 0 and "is finished; its digests are verified" in out
  assert str(mine.digests) in out
