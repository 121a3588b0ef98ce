"""Digests of a run's text: what they depend on, and what is said when they differ."""

import pytest

from jaxlm.config import DataConfig
from jaxlm.data.loader import load_text
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.text_identity import changed_text, check_text, record_text


@pytest.fixture
def source(tmp_path):
  (tmp_path / "text").mkdir()
  for index in range(20):
    (tmp_path / "text" / f"{index}.txt").write_text(f"document {index} " * 10)
  return tmp_path / "text"


def read(source, **options):
  return load_text(DataConfig(source=str(source), length=16, holdout=0.3, **options))


def digests(source, **options):
  return read(source, **options).digests


def test_one_character_changes_the_digest_of_its_side_alone(source, tmp_path):
  folder = RunFolder(tmp_path)
  before = digests(source)
  assert changed_text(folder, before) == []  # a new run
  record_text(folder, read(source))
  assert changed_text(folder, before) == []
  sides = set()
  for path in source.iterdir():
    content = path.read_text()
    path.write_text(content[:-1] + "!")
    (line,) = changed_text(folder, digests(source))
    sides.add(line.split(" text: ")[0])
    path.write_text(content)
  assert sides == {"training", "held-out"}
  assert digests(source) == before


def test_the_digest_does_not_depend_on_rows(source):
  before = digests(source)
  assert digests(source, layout="packed", threads=1) == before


def test_where_a_document_ends_matters(source):
  before = digests(source)
  first, second = (source / name for name in ("0.txt", "1.txt"))
  text = first.read_text()
  first.write_text(text[:-3])
  second.write_text(text[-3:] + second.read_text())
  assert digests(source) != before


def test_a_run_without_digests_is_named(source, tmp_path, capsys):
  text = read(source)
  check_text(RunFolder(tmp_path), text, other_text=True)
  assert capsys.readouterr().out == ""
  check_text(RunFolder(tmp_path), text, other_text=False)
  assert "text.json is missing: the text may not be the one" in capsys.readouterr().out
  record_text(RunFolder(tmp_path), text)
  check_text(RunFolder(tmp_path), text, other_text=False)
  assert capsys.readouterr().out == ""
