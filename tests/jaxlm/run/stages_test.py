"""A run trains in pipeline stages by two flags, and goes on with another number of them.

Muon, whose matrices the stages split, is the rule that can go wrong there.
"""

import pytest

from benchmarks.reliability.processes import SMALL, write_corpus
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder, read_records

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

FLAGS = [*SMALL, "--eval_every", "0", "--save_every", "0", "--ema", "0", "--batch", "8"]
FLAGS += ["--accumulate", "4", "--model.layers", "4", "--data.layout", "packed"]
FLAGS += ["--optimizer.schedule", "constant", "--optimizer.name", "muon"]
ONE = ["--mesh.data", "1"]
TWO = ["--mesh.data", "2", "--mesh.stage", "2", "--schedule", "zb_h1"]
FOUR = ["--mesh.data", "1", "--mesh.stage", "4", "--pipeline.schedule", "1f1b"]


@pytest.mark.slow
def test_a_run_in_stages_resumes_with_more_of_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_corpus(tmp_path / "text")
  assert main(["train", "micro", "--run", "one", "--steps", "4", *FLAGS, *ONE]) == 0
  assert main(["train", "micro", "--run", "staged", "--steps", "2", *FLAGS, *TWO]) == 0
  assert main(["resume", "staged", "--steps", "4", *FOUR]) == 0
  one, staged = ([*read_records(RunFolder(tmp_path / run).metrics)] for run in ("one", "staged"))
  assert [record["step"] for record in staged] == [1, 2, 3, 4]
  for name in ("loss", "grad_norm", "tokens"):
    got, want = ([record[name] for record in records] for records in (staged, one))
    assert got == pytest.approx(want, rel=1e-5)
  evaluations = [[*read_records(RunFolder(tmp_path / run).evals)] for run in ("one", "staged")]
  losses = [records[-1]["heldout_loss"] for records in evaluations]
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)
