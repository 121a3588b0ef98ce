"""`jaxlm tokenize` and training from what it wrote."""

import json

import pytest

from jaxlm.cli import main

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SMALL = (
  "--model.D 16 --model.pattern.0.feedforward.F 16 --model.pattern.0.mixer.H 8 "
  "--mesh.data 1 --data.length 16 --optimizer.warmup 1 "
  "--steps 3 --eval_every 0 --save_every 0"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working folder whose name is hard to quote, with 20 documents in it."""
  folder = tmp_path / "a [b] %20'é#?*{x}$HOME~"
  (folder / "text").mkdir(parents=True)
  for index in range(20):
    (folder / "text" / f"{index}.txt").write_text(f"document {index} " * 20)
  monkeypatch.chdir(folder)
  return folder


@pytest.mark.slow
def test_training_from_a_store_is_training_on_its_text(folder, tmp_path, capsys):
  tokenizer = "bpe:270"
  assert main(["tokenize", "text", "store", "--tokenizer", tokenizer, "--holdout", "0.1"]) == 0
  printed = capsys.readouterr().out
  flags = printed.rpartition("jaxlm train PRESET ")[2].split()
  assert flags[:2] == ["--data.source", "store"]
  text = ["--data.source", "text", "--data.tokenizer", tokenizer, "--data.holdout", "0.1"]
  assert main(["train", "micro", *SMALL, "--run", str(tmp_path / "from_store"), *flags]) == 0
  assert main(["train", "micro", *SMALL, "--run", str(tmp_path / "from_text"), *text]) == 0
  losses = [
    [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
    for run in ("from_store", "from_text")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 3
  assert main(["eval", str(tmp_path / "from_store")]) == 0
  assert "zlib" in capsys.readouterr().out


def test_mistakes_are_one_line(folder, capsys):
  assert main(["tokenize", "text", "store"]) == 0
  capsys.readouterr()
  assert main(["tokenize", "text", "store", "--tokenizer", "bpe:270"]) == 2
  assert capsys.readouterr().err == (
    "jaxlm: store: data.tokenizer='bpe:270': the store was made with 'bytes'; name a new store\n"
  )
  assert main(["tokenize", "text", "gs://bucket/store"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
  assert sorted(path.name for path in folder.iterdir()) == ["store", "text"]


@pytest.mark.parametrize("name", ["back\\slash", "\udcff", "gs:/x", "[!a]"], ids=ascii)
def test_a_store_has_any_name_that_a_folder_can_have(folder, name, monkeypatch):
  monkeypatch.chdir(folder / "text")
  store = folder / name
  for _ in range(2):  # the second time it is verified
    assert main(["tokenize", "0.txt", str(store)]) == 0
  assert sorted(path.name for path in store.iterdir()) == ["heldout", "token_store.json", "train"]
  assert {path.name for path in folder.iterdir()} == {"text", name.split("/")[0]}


def test_a_refused_source_leaves_no_folder_of_its_store(folder):
  (folder / "bad.txt").write_bytes(b"a\0b")
  before = sorted(folder.rglob("*"))
  assert main(["tokenize", "bad.txt", "new/deep/store"]) == 2
  assert sorted(folder.rglob("*")) == before
  (folder / "empty").mkdir()
  (folder / "empty/.DS_Store").write_text("")  # of the system, so the folder counts as empty
  assert main(["tokenize", "bad.txt", "empty"]) == 2
  assert [path.name for path in (folder / "empty").iterdir()] == [".DS_Store"]
