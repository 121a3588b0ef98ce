"""`jaxlm fit` on a table of one's own: numbers, intervals, verdict and picture."""

import pytest

from jaxlm.cli import main
from jaxlm.scaling.published import gadre, porian

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture
def table(tmp_path):
  rows = [f"{run.loss},{run.tokens},{run.body}" for run in gadre()]
  path = tmp_path / "mine.csv"
  path.write_text("\n".join(["nats,tokens,parameters", *rows]))
  return path


@pytest.mark.slow
def test_a_law_of_a_table(table, tmp_path, capsys):
  picture = tmp_path / "fit.png"
  flags = ["--loss", "nats", "--counts", "body", "--samples", "20", "--budget", "1e22"]
  assert main(["fit", str(table), *flags, "--out", str(picture)]) == 0
  text = capsys.readouterr().out
  assert "chinchilla law of 34 runs, N counts body; Huber delta 0.001" in text
  assert "0.533" in text and "N at 1e+22" in text and "- B not identified" in text
  assert picture.stat().st_size > 10_000


def test_isoflop_of_a_table(tmp_path, capsys):
  rows = [f"{run.loss},{run.tokens},{run.total},{run.flops}" for run in porian("4")]
  table, picture = tmp_path / "runs.csv", tmp_path / "line.png"
  table.write_text("\n".join(["loss,tokens,parameters,flops", *rows]))
  flags = ["--law", "isoflop", "--flops", "flops", "--samples", "20", "--out", str(picture)]
  assert main(["fit", str(table), *flags]) == 0
  text = capsys.readouterr().out
  assert "C^0.55" in text and text.count("minimum") == 12 and picture.exists()


def test_a_column_that_is_not_there_is_one_line(table, capsys):
  assert main(["fit", str(table)]) == 2
  assert "columns='loss': mine.csv has nats, tokens, parameters" in capsys.readouterr().err
