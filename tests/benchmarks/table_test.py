"""The table writer of all benchmarks, and what they may import."""

import re
from pathlib import Path

import pytest

from benchmarks import table

FILES = sorted((Path(__file__).parents[2] / "benchmarks").rglob("*.py"))


def test_a_table_has_a_line_per_row():
  assert table.table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_the_spread_is_the_median_and_the_middle_four_fifths():
  assert table.spread(range(101), digits=0) == "50 (10 - 90)"
  assert table.spread([0.001, 0.002, 0.003], digits=1, scale=1e3) == "2.0 (1.2 - 2.8)"
  assert table.median_ratio([2, 9, 4], [1, 3, 4]) == 2


def test_a_report_names_command_hardware_and_versions(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr("sys.argv", ["x", "--turns", "3"])
  page = table.report("Title", "body", "jax", "no_such_library")
  assert re.search(r"^    python .* --turns 3$", page, re.MULTILINE)
  versions = r"\d+ cores? of .+, Python 3\.\d+\.\d+, jax \d+\.\d+\S*, no_such_library not installed"
  assert re.search(rf"^20\d\d-\d\d-\d\d; {versions}$", page, re.MULTILINE)
  table.publish(page, tmp_path / "results/page.md")
  assert (tmp_path / "results/page.md").read_text() == page == capsys.readouterr().out[:-1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmarks_take_nothing_from_tests_and_share_this_writer(path):
  source = path.read_text()
  assert not re.search(r"^\s*(from|import) tests\b", source, re.MULTILINE)
  if path.name != "table.py":
    assert '"---"' not in source and "|---|" not in source
