"""The studies: what they would train at each scale, and what they conclude from made-up rows."""

import functools
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import small_text
from jaxlm.scaling.flops import parameter_count, train_flops_per_token
from jaxlm.scaling.grid import GridRun
from jaxlm.scaling.sweep import read_table
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

TEXT = ["data_constrained", "isoflop", "kaplan_vs_chinchilla", "lr_horizon", "step_law"]
TEXT += ["quest_scaling", "wsd_vs_cosine", "spinquant", "super_weight", "optimizer_8bit"]


def rows_of(config, points):
  """Returns the rows that a sweep would write for these points, but for their losses."""
  rows = []
  runs = {}
  for point in points:
    free = ("seed", "optimizer.learning_rate")  # neither shape nor cost depends on them
    same = tuple((name, value) for name, value in point.items() if name not in free)
    run = runs[same] = runs.get(same) or GridRun.of(config, dict(same))
    model, steps = run.config.model, run.config.steps
    parts = parameter_count(model)
    tokens = steps * run.config.batch * run.config.data.length
    cost = {
      "body": parts.blocks + model.D,
      "head": model.D * model.V,
      "embedding": parts.embedding,
      "flops": train_flops_per_token(model, run.config.data.length) * tokens,
    }
    rows.append(
      dict(point) | cost | {"status": "finished", "step": steps, "tokens": tokens, "run": run}
    )
  return rows


@functools.cache
def planned(study, scale):
  """Returns the rows of all runs that a study plans at a scale, without losses."""
  module = importlib.import_module(f"experiments.{study}.run")
  rows = []

  def record(config, points, table, **_):
    rows.extend(new := rows_of(config, points))
    return with_losses(new, lambda row: math.log(row["optimizer.learning_rate"] / 0.011) ** 2)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "sweep" if study == "data_constrained" else "train", record)
    module.STUDY.measure(scale, Path("nowhere"), None)
  return rows


def with_losses(rows, loss):
  return [row | {"heldout_loss": loss(row), "bits_per_byte": loss(row)} for row in rows]


def conclude(study, loss):
  definition = importlib.import_module(f"experiments.{study}.run").STUDY
  return definition.conclude(with_losses(planned(study, "cpu"), loss))


def ladder_of_rates(exponent):
  def loss(row):
    best = 0.02 * (row["tokens"] / 77824) ** (exponent + 0.02 * (row["seed"] - 1))
    return 2 + 0.1 * math.log(row["optimizer.learning_rate"] / best) ** 2

  return loss


def repeated(four, sixteen):
  def loss(row):
    epochs = row["steps"] / row["task.unique_steps"]
    fresh = 2.4 * (row["steps"] / 100) ** -0.1 + 0.002 * row["seed"]
    worse = 1 + four * (epochs >= 4) + (sixteen - four) * (epochs >= 16)
    return fresh * worse * (1 + 0.001 * math.sin(row["seed"] + epochs))

  return loss


def schedules(cooldown, constant):
  def loss(row):
    over = {"wsd": cooldown, "constant": constant}.get(row["optimizer.schedule"], 0.0)
    return 2 + over + 0.002 * math.sin(row["seed"] + over) + 0.01 * row["seed"]

  return loss


def valleys(exponents):
  """Losses whose best N (with head) grows with the exponent of the row's method."""

  def loss(row):
    warmup, ends = row["optimizer.warmup"], row["optimizer.schedule_steps"] == 0
    a = exponents[2] if ends else exponents[0] if warmup > 50 else exponents[1]
    best = 9e3 * (row["flops"] / 2e10) ** a
    return 2 + 0.05 * math.log((row["body"] + row["head"]) / best) ** 2

  return loss


def bowl(of_N, of_D, batch_of_D):
  def loss(row):
    batch = row["tokens"] / row["step"]
    best = 0.016 * (row["body"] / 6e3) ** of_N * (row["tokens"] / 5e5) ** of_D
    best_batch = 1400 * (row["tokens"] / 5e5) ** batch_of_D
    rate = math.log(row["optimizer.learning_rate"] / best)
    return (
      2
      + 0.05 * rate**2
      + 0.03 * math.log(batch / best_batch) ** 2
      + 0.01 * math.sin(9 * rate + batch)
    )

  return loss


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CONCLUSIONS = [
  ("lr_horizon", ladder_of_rates(-0.32), "reproduced"),
  ("lr_horizon", ladder_of_rates(-0.12), "direction only"),
  ("lr_horizon", ladder_of_rates(0.2), "refuted"),
  ("data_constrained", repeated(0.003, 0.1), "reproduced"),
  ("data_constrained", repeated(0.05, 0.1), "refuted"),
  ("data_constrained", repeated(0.02, 0.1), "direction only"),
  ("wsd_vs_cosine", schedules(-0.01, 0.1), "reproduced"),
  ("wsd_vs_cosine", schedules(0.05, 0.1), "refuted"),
  ("wsd_vs_cosine", schedules(0.02, 0.1), "direction only"),
  ("kaplan_vs_chinchilla", valleys([0.6, 0.5, 0.4]), "reproduced"),
  slow("kaplan_vs_chinchilla", valleys([0.55, 0.6, 0.35]), "direction only"),
  slow("kaplan_vs_chinchilla", valleys([0.3, 0.4, 0.6]), "refuted"),
  ("step_law", bowl(-0.713, 0.307, 0.571), "reproduced"),
  ("step_law", bowl(-0.3, 0.1, 0.2), "direction only"),
  ("step_law", bowl(-0.713, -0.3, 0.571), "refuted"),
]


@pytest.mark.parametrize("study, loss, verdict", CONCLUSIONS)
def test_the_verdict_follows_the_rows(study, loss, verdict):
  finding = conclude(study, loss)
  assert finding.verdict == verdict, finding
  assert finding.ours and finding.interval and finding.why and finding.lines


@pytest.mark.slow
def test_the_isoflop_study_finds_the_exponent_of_a_law(monkeypatch):
  """Ten resamples are enough: intervals alone depend on their number."""
  module = importlib.import_module("experiments.isoflop.run")
  compare = module.compare
  monkeypatch.setattr(module, "compare", lambda *a, **k: compare(*a, **k | {"samples": 10}))

  def loss(row):
    if row["seed"] >= 100:
      return 2 + math.log(row["optimizer.learning_rate"] / 0.015) ** 2
    N = row["body"] + row["head"] + row["embedding"]
    return 0.5 + (N / 80) ** -0.35 * 4 + (row["flops"] / N / 6 / 6e3) ** -0.35 * 4

  finding = conclude("isoflop", loss)
  assert finding.verdict == "reproduced", finding
  assert any("joint: coupled" in line for line in finding.lines)


@pytest.mark.parametrize("study", TEXT)
def test_what_two_cores_train_fits_their_time(study):
  smoke, rows = planned(study, "smoke"), planned(study, "cpu")
  assert len({row["run"].shape for row in smoke}) <= 12
  assert sum(row["flops"] for row in smoke) < 2e11
  assert sum(row["flops"] for row in rows) < 3e13  # at 20 GFLOP/s 25 minutes
  assert max(row["tokens"] for row in rows) < 9e6  # the standard library, once
  assert min(row["step"] for row in rows) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("study", TEXT)
def test_what_a_gpu_trains_fits_its_time(study):
  rows = planned(study, "gpu")
  assert sum(row["flops"] for row in rows) < 1e17
  assert max(row["tokens"] for row in rows) < 1.2e8 and min(row["step"] for row in rows) >= 46


@pytest.mark.slow
def test_a_study_runs_from_its_command(tmp_path):
  command = [sys.executable, "-m", "experiments.lr_horizon.run", "--smoke", "--out", str(tmp_path)]
  printed = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert printed.returncode == 0, printed.stdout + printed.stderr
  rows = read_table(tmp_path / "table_smoke.csv")
  assert len(rows) == 18 and {row["status"] for row in rows} == {"finished"}
  assert all(row["flops"] > 0 and row["heldout_loss"] < 5.6 and row["commit"] for row in rows)
  assert "lr_horizon, smoke:" in printed.stdout and (tmp_path / "README.md").is_file()


def test_text_is_not_read_twice(monkeypatch):
  monkeypatch.setattr(small_text, "count_rows", lambda data: 100)
  config = small_text.base("smoke")
  with pytest.raises(UserError, match="steps=13: reads 104 rows, the text has 100"):
    small_text.train(config, [{"steps": 12}, {"steps": 13}], Path("nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("study", TEXT)
def test_a_committed_table_has_every_row_of_the_plan(study, monkeypatch):
  module = importlib.import_module(f"experiments.{study}.run")
  rows = {row["config"]: row for row in read_table(Path(module.__file__).parent / "table.csv")}
  if not rows:
    pytest.skip(f"{study} has not been run")

  def find(config, points, table, **_):
    digests = [GridRun.of(config, point).digest for point in points]
    assert [digest for digest in digests if digest not in rows] == []
    return [rows[digest] for digest in digests]

  monkeypatch.setattr(module, "sweep" if study == "data_constrained" else "train", find)
  module.STUDY.measure("cpu", Path("nowhere"), None)
