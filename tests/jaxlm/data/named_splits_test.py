"""Files and folders that are named as splits are taken as such, and a path can name one."""

import pytest

from jaxlm.cli import main
from jaxlm.config import DataConfig
from jaxlm.data.cache import open_text
from jaxlm.data.corpus import open_source
from jaxlm.data.named_splits import find_roles
from pallas_kernels.common.errors import UserError

NAMES = {
  "train.txt": "train",
  "Train/a.txt": "train",
  "data/training_set/a.txt": None,
  "wiki.train.txt": None,
  "val.txt": "validation",
  "VAL/b.txt": "validation",
  "valid.jsonl.zst": "validation",
  "validation-00000-of-00002.parquet": "validation",
  "heldout.txt": "validation",
  "en/val2017/a.txt": "validation",
  "evaluate.txt": None,
  "validate.py": None,
  "val.py": None,
  "src/validation/checks.py": None,
  "test.txt": None,
  "dev.md": None,
  "the-test-of-time.txt": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_alone(name):
  assert find_roles([name, "other.txt"]) == [NAMES[name], None]


@pytest.mark.parametrize(
  ("names", "roles"),
  [
    (["train.txt", "dev.txt", "test.txt"], "train validation test"),
    (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], "train validation test"),
    (["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"], "train validation"),
    (["train-0000-of-0002.parquet", "validation-0-of-1.parquet"], "train validation"),
    (["c4-train.00000-of-01024.jsonl.gz", "c4-validation.0-of-8.jsonl.gz"], "train validation"),
    (["x-train/a.txt", "x-test/a.txt"], "train test"),
    (["train/a.py", "test/b.py"], "train test"),
    (["train.py", "test.py"], "None None"),
    (["src/a.py", "test/b.py"], "None None"),
    (["train/val.txt", "val/train.txt"], "train validation"),
    (["how-to-train-a-dragon.txt", "the-test-of-time.txt"], "None None"),
    (["a/train.txt", "b/valid.txt", "README.md"], "train validation None"),
  ],
)
def test_names_together(names, roles):
  assert " ".join(map(str, find_roles(names))) == roles


def write(folder, **sizes):
  for name, size in sizes.items():
    path = folder / name.replace("__", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text("0123456789\n" * size)


def sizes(folder, **options):
  store = open_text(DataConfig(source=str(folder), **options))
  return store.train.size // 11, store.heldout.size // 11, store.report


def test_named_files_are_the_sides_and_it_is_said(tmp_path):
  write(tmp_path, train=90, val=2)
  train, heldout, report = sizes(tmp_path)
  assert (train, heldout) == (90, 2) and "held out by name" in report and ": val.txt" in report
  assert sizes(tmp_path, heldout="none")[1] == 2  # whole lines in 3 % of 92


def test_of_three_splits_the_test_set_is_left_alone(tmp_path):
  write(tmp_path, train__a=90, VAL__b=2, test__c=5, other=7)
  train, heldout, report = sizes(tmp_path)
  assert (train, heldout) == (90, 2)
  assert "left out, being named test: test/c.txt" in report
  assert "left out, being named no part of the split: other.txt" in report


def test_a_test_set_is_held_out_where_there_is_no_other(tmp_path):
  write(tmp_path, train0=40, train1=50, test=5)
  assert sizes(tmp_path)[:2] == (90, 5)


def test_without_anything_named_train_the_rest_is_trained_on(tmp_path):
  write(tmp_path, a=40, b=50, valid=5)
  assert sizes(tmp_path)[:2] == (90, 5)


@pytest.mark.parametrize("held", ["b.txt", "sub", "outside"])
def test_a_path_names_what_is_held_out(tmp_path, held):
  folder = tmp_path / "text"
  write(folder, a=60, b=7, sub__c=8, test=9)
  write(tmp_path / "outside", d=5)
  path = tmp_path / "outside" if held == "outside" else folder / held
  train, heldout, report = sizes(folder, heldout=str(path))
  rest = {"b.txt": 8, "sub": 7, "outside": 15}[held]
  assert (train, heldout) == (60 + rest + 9, {"b.txt": 7, "sub": 8, "outside": 5}[held])
  assert f"held out {path}" in report


def test_a_named_path_keeps_other_held_out_sets_out_of_training(tmp_path):
  write(tmp_path, train=60, val=7, test=9)
  train, heldout, report = sizes(tmp_path, heldout=str(tmp_path / "test.txt"))
  assert (train, heldout) == (60, 9) and "left out, being named validation: val.txt" in report


def test_max_bytes_is_of_each_side(tmp_path):
  write(tmp_path, train0=40, train1=50, val=30)
  train, heldout, report = sizes(tmp_path, max_bytes=44 * 11)
  assert (train, heldout) == (44, 30) and "stopped at data.max_bytes=484" in report


def test_records_that_hold_out_more_than_they_train_on_are_refused_when_they_are_read(tmp_path):
  (tmp_path / "train.jsonl").write_text('{"text": "ab", "more": "than is text"}')
  (tmp_path / "val.jsonl").write_text('{"text": "abc"}')
  with pytest.raises(UserError, match=r"3 bytes would be held out and only 2 .*: val.jsonl\)"):
    sizes(tmp_path)


@pytest.mark.parametrize("options", [{}, {"heldout": "train.txt"}])
def test_less_training_than_held_out_text_is_refused(tmp_path, monkeypatch, options):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, train=20, val=21) if not options else write(tmp_path, train=20, other=3)
  with pytest.raises(UserError, match="bytes would be held out and only .* trained on.*none"):
    open_source(DataConfig(source=str(tmp_path), **options))  # before anything is read


def test_nothing_left_to_train_on_and_empty_sides(tmp_path):
  write(tmp_path, a=3, val=0)
  with pytest.raises(UserError, match="there is no text to hold out .*1 empty documents"):
    sizes(tmp_path)
  with pytest.raises(UserError, match="leaves nothing of"):
    sizes(tmp_path / "a.txt", heldout=str(tmp_path / "a.txt"))
  with pytest.raises(UserError, match="data.heldout='nowhere': no such file or folder"):
    sizes(tmp_path, heldout="nowhere")
  assert len(open_source(DataConfig(source=str(tmp_path), heldout="none")).parts) == 2


def test_the_command_takes_the_path_too(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "text", a=90, b=3)
  write(tmp_path, eval_text=5)
  assert main(["tokenize", "text", "store", "--heldout", "eval_text.txt"]) == 0
  assert "held out eval_text.txt" in capsys.readouterr().out
