"""What a user who gets it wrong is told: every message, as it is printed, stands in messages.txt.

`WRITE_MESSAGES=1 make test TESTS=tests/reliability/messages_test.py` writes that file anew.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.processes import SMALL, write_corpus
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder

GOLDEN = Path(__file__).with_name("messages.txt")
TRAIN = "jaxlm train micro --run r --mesh.data 1 "
CASES = f"""
jaxlm trian micro
jaxlm train mikro
jaxlm train micro --model.layrs 3
jaxlm train micro --stepz 3
jaxlm train micro --steps many
jaxlm train micro --optimizer.name adam
jaxlm train micro --model.pattern.0.mixer.N 3 --model.pattern.0.mixer.K 2
jaxlm train micro --model.pattern.0.mixer.H 7
jaxlm train micro --model.pattern.0.mixer.window 0
jaxlm train micro --batch 6 --accumulate 4
jaxlm train micro --optimizer.learning_rate nan
jaxlm train micro --stop_after soon
jaxlm train micro --run r --mesh.data 3 --mesh.fsdp 64
jaxlm train micro --run r --mesh.data 8 --batch 12
jaxlm train micro --run r --mesh.data 1 --mesh.tensor 2 --model.pattern.0.feedforward.F 33
jaxlm train micro --run r --mesh.data 1 --mesh.stage 2 --schedule zb_v
{TRAIN}--data.source nowhere
{TRAIN}--data.source empty
{TRAIN}--data.source blank
{TRAIN}--data.source binary
{TRAIN}--data.source latin
{TRAIN}--data.source picture.png
{TRAIN}--data.source text --data.length 100000
{TRAIN}--data.source text --optimizer.warmup 50 --steps 50
{TRAIN}--data.source text --data.tokenizer bpe:200
{TRAIN}--data.source text --data.tokenizer nowhere.json
{TRAIN}--data.source text --data.tokenizer damaged.json
{TRAIN}--data.source records --data.text_field body
jaxlm train micro --run done
jaxlm train done/config.json --run r --model.D 0
jaxlm train broken/config.json --run r
jaxlm resume nowhere
jaxlm resume done
jaxlm resume done --steps 9 --model.D 32 --seed 1
jaxlm resume done --steps 9 --run elsewhere
jaxlm resume wider --steps 9
jaxlm resume other_rule --steps 9
jaxlm resume misspelt --steps 9
jaxlm resume mistyped --steps 9
jaxlm resume broken --steps 9
jaxlm resume newer --steps 9
jaxlm resume other_tokenizer --steps 9
jaxlm sample other_tokenizer
jaxlm sample done --temperature -1
jaxlm replay done --step 99
jaxlm plot empty
jaxlm convert done done
"""


def edit(folder: Path, path: str, value) -> None:
  """Changes one field of a run's config.json."""
  values = json.loads((folder / "config.json").read_text())
  *groups, name = path.split(".")
  group = values
  for key in groups:
    group = group[key]
  group[name] = value
  (folder / "config.json").write_text(json.dumps(values))


def rename(folder: Path, old: str, new: str) -> None:
  text = (folder / "config.json").read_text()
  (folder / "config.json").write_text(text.replace(f'"{old}"', f'"{new}"'))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
  """A working folder with sources that are wrong and runs that somebody changed."""
  place = tmp_path_factory.mktemp("messages")
  write_corpus(place / "text")
  for name in ("empty", "blank", "binary", "latin", "records"):
    (place / name).mkdir()
  (place / "blank/a.txt").write_text("")
  (place / "binary/a.txt").write_bytes(b"text\n\0\1\2\xff")
  (place / "latin/a.txt").write_bytes("na\xefve".encode("latin-1"))
  (place / "records/a.jsonl").write_text('{"text": "a"}\n')
  (place / "picture.png").write_bytes(b"\x89PNG")
  (place / "damaged.json").write_text("{")
  before = Path.cwd()
  os.chdir(place)
  try:
    flags = [
      "--steps",
      "2",
      "--save_every",
      "0",
      "--eval_every",
      "0",
      "--data.tokenizer",
      "bpe:270",
    ]
    assert main(["train", "micro", "--run", "done", *SMALL, *flags]) == 0
  finally:
    os.chdir(before)
  for name in ("wider", "other_rule", "misspelt", "mistyped", "broken", "newer", "other_tokenizer"):
    shutil.copytree(place / "done", place / name)
  edit(place / "wider", "model.D", 32)
  edit(place / "wider", "model.tied", True)
  edit(place / "other_rule", "optimizer.name", "muon")
  rename(place / "misspelt", "layers", "layrs")
  edit(place / "mistyped", "model.layers", "two")
  (place / "broken/config.json").write_text('{"steps": 3')
  manifest = place / "newer/checkpoints/00000002/manifest.json"
  manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
  _bigger_tokenizer(place / "other_tokenizer/tokenizer.json")
  return place


def _bigger_tokenizer(path: Path) -> None:
  from jaxlm.data.tokenizer import BPETokenizer

  tokenizer = BPETokenizer.load(path)
  tokenizer.model.add_tokens(["<another>"])
  tokenizer.save(path.parent)


def said(command: str, capsys) -> str:
  """The command and what it printed, without the frames that rich draws and without colours."""
  try:
    status = main(shlex.split(command)[1:])
  except SystemExit as stop:  # tyro's own errors
    status = stop.code
  captured = capsys.readouterr()
  lines = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", captured.out + captured.err).splitlines()
  text = "\n".join("  " + " ".join(line.split()) for line in lines if line.strip())
  assert "Traceback" not in text
  return f"$ {command}\n{text}\n  [exit status {status}]\n"


@pytest.mark.slow
def test_every_message_is_the_one_in_the_file(place, capsys, monkeypatch):
  monkeypatch.chdir(place)
  monkeypatch.setenv("COLUMNS", "200")
  before = {path for path in place.rglob("*")}
  found = [said(command, capsys) for command in CASES.strip().splitlines()]
  assert all("[exit status 0]" not in case for case in found)
  assert {path for path in place.rglob("*")} - before <= {
    run / "lock" for run in place.iterdir()
  }  # nothing was begun
  if os.environ.get("WRITE_MESSAGES"):
    GOLDEN.write_text("\n".join(found))
  want = GOLDEN.read_text().split("\n$ ")
  for case, expected in zip(found, want, strict=True):
    assert case.removeprefix("$ ").strip() == expected.removeprefix("$ ").strip()


def test_invalid_utf8_is_replaced_and_counted_when_told_to(place, monkeypatch):
  from jaxlm.config import DataConfig
  from jaxlm.data.arrays import read_blocks
  from jaxlm.data.cache import open_text

  (place / "latin/b.txt").write_text("fine")
  store = open_text(DataConfig(source=str(place / "latin"), invalid_utf8="replace"))
  (place / "latin/b.txt").unlink()
  assert "1 invalid UTF-8 sequences replaced" in store.report
  tokens = [*read_blocks(store.train.tokens), *read_blocks(store.heldout.tokens)]
  assert "\ufffdve" in b"".join(block.tobytes() for block in tokens).decode()


def test_a_refused_resume_changes_nothing(place, monkeypatch):
  monkeypatch.chdir(place)
  for name in ("wider", "newer", "other_tokenizer"):
    folder = RunFolder(place / name)
    before = {
      path: path.read_bytes()
      for path in folder.path.rglob("*")
      if path.is_file() and path.name != "lock"
    }
    assert main(["resume", name, "--steps", "9"]) == 2
    after = {
      path: path.read_bytes()
      for path in folder.path.rglob("*")
      if path.is_file() and path.name != "lock"
    }
    assert after == before
