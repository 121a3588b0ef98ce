"""The study of one to four bits: its verdicts from made-up rows, its plan, and its phases."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import finetuned
from experiments.finetuned import Setup
from experiments.paretoq import run
from jaxlm.config import TrainConfig
from jaxlm.scaling.flops import train_flops_per_token
from jaxlm.scaling.grid import GridRun
from jaxlm.scaling.sweep import read_table
from pallas_kernels.common.errors import UserError
from tests.experiments.planned import planned

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

LOSS = {"1": 2.3, "ternary": 2.2, "2": 2.1, "3": 2.05, "4": 2.0, "16": 1.95}
MOVED = {"1": 0.2, "ternary": 0.2, "2": 0.19, "3": 0.11, "4": 0.1, "16": 0.1}
SPLIT = {0: 0.2, 50: 0.05, 80: 0.01, 90: 0.0, 100: 0.9}


def rows_of(loss=LOSS, moved=MOVED, split=SPLIT, others=0.05):
  rows = []
  for point in planned(run, "cpu"):
    bits, seed = point["task.bits"], point["task.seed"]
    noise = 0.002 * np.sin(7 * seed + len(rows))
    value = loss[bits] + split[point["task.full"]] + noise + 0.05 * seed
    value += others * (point["task.method"] not in (run.OWN, run.FULL))
    change = {"l1": moved[bits] + noise, "l2": moved[bits] + noise, "before": value + 0.3}
    rows.append(point | {"heldout_loss": value} | change)
  return rows


@pytest.mark.parametrize(
  "changed, verdict, why",
  [
    ({}, "reproduced", "All four claims hold"),
    ({"moved": MOVED | {"3": 0.14}}, "direction only", "weights move away at 2 bits"),
    ({"others": 0.0}, "direction only", "its own function is best"),
    ({"split": SPLIT | {50: -0.1}}, "direction only", "80 or 90 % in full precision are best"),
    ({"split": SPLIT | {0: -0.1}}, "refuted", "training in few bits from the start is best"),
    ({"others": -0.05}, "refuted", "one function for all widths is better at 2 bits"),
    ({"moved": MOVED | {"2": 0.08, "ternary": 0.09}}, "refuted", "move less than"),
    ({"loss": LOSS | {"4": 2.06}}, "undecided", "each bit more lowers the loss"),
  ],
)
def test_the_verdict_follows_the_rows(changed, verdict, why):
  finding = run.conclude(rows_of(**changed))
  assert finding.verdict == verdict and why in finding.why, finding
  assert any(line.startswith("full precision, trained on") for line in finding.lines)


def test_runs_that_are_missing_decide_nothing():
  rows = rows_of()
  with pytest.raises(UserError, match="each width is needed for each seed"):
    run.conclude([row for row in rows if row["task.bits"] != "3" or row["task.seed"] != 1])
  with pytest.raises(UserError, match="seeds=1: two are needed"):
    run.conclude([row for row in rows if row["task.seed"] == 0])


SIZES = [("smoke", 2e11), ("cpu", 1.3e13), pytest.param("gpu", 1e17, marks=pytest.mark.slow)]
"""training FLOPs at most"""


@pytest.mark.parametrize("scale, most", SIZES)
def test_what_is_trained_fits_its_time(scale, most):
  """Each phase counts once, full precision once for all that start from it."""
  points = planned(run, scale)
  setup = Setup(**{k: points[0][f"task.{k}"] for k in Setup._fields})
  config = finetuned.from_scratch(scale, setup, setup.steps)
  starts = {(p["task.seed"], p["task.full"]) for p in points}
  shares = sum(full for _, full in starts) + sum(100 - p["task.full"] for p in points)
  tokens = shares / 100 * setup.steps * config.batch * config.data.length
  assert tokens * train_flops_per_token(config.model, config.data.length) < most


def test_each_point_has_a_row_of_its_own():
  points = planned(run, "smoke")
  assert len({GridRun.of(TrainConfig(), point).digest for point in points}) == len(points)


def test_the_second_phase_goes_on_where_the_first_ended_in_weights_and_text(monkeypatch):
  seen = []
  monkeypatch.setattr(finetuned, "train", lambda *args, **kw: seen.append((args, kw)) or "trained")
  monkeypatch.setattr(finetuned, "heldout_loss", lambda *args: 2.0)
  monkeypatch.setattr(finetuned, "full_precision", lambda scale, setup, steps: ("full", steps))
  monkeypatch.setattr(finetuned, "relative_change", lambda *pair: (pair, 0.0))
  setup = {"D": 16, "layers": 1, "steps": 50, "seed": 1}
  row = run.measure_run("smoke", run.OWN, "2", 80, **setup)
  (((config, rules, start), kw),) = seen
  assert (config.steps, config.seed, start, kw) == (10, 1, ("full", 40), {"first_step": 40})
  assert str(rules[0].spec.weight) == "ParetoQ int2 per row" and config.optimizer.warmup == 0
  assert row["l1"] == (("full", 40), "trained") and row["before"] == 2.0
  run.measure_run("smoke", run.OWN, "2", 0, **setup)
  assert seen[1][0][0] == finetuned.from_scratch("smoke", Setup(**setup), 50) and not seen[1][1]
  assert run.measure_run("smoke", run.OWN, "2", 100, **setup) == {"heldout_loss": 2.0}
  assert len(seen) == 2


def test_changes_are_means_over_the_matrices_of_all_layers():
  before = {"stacks": {"0": {"q": {"weight": np.ones((2, 2, 3)), "weight_scale": np.ones((2, 3))}}}}
  after = jax.tree.map(np.copy, before)
  after["stacks"]["0"]["q"]["weight"][0] += np.array([[0.5, 0, 0], [0, 0, -0.5]])
  l1, l2 = finetuned.relative_change(before, after)
  np.testing.assert_allclose((l1, l2), (0.5 / 6, 0.5 * np.sqrt(0.5 / 6)))


@pytest.mark.slow
def test_training_on_starts_from_the_given_weights_and_reads_other_text():
  setup = Setup(16, 1, 12, 0)
  start = finetuned.train(finetuned.from_scratch("smoke", setup, 8))
  config = finetuned.from_trained("smoke", setup, 1)
  still = dataclasses.replace(config.optimizer, learning_rate=1e-9)
  rules = run.rules_of(run.OWN, "2")
  same = finetuned.train(dataclasses.replace(config, optimizer=still), rules, start, first_step=8)
  assert finetuned.relative_change(start, same)[0] < 1e-6
  first, later = (finetuned.train(config, (), start, first_step=step) for step in (0, 8))
  assert finetuned.relative_change(first, later)[0] > 1e-5
  with pytest.raises(UserError, match="steps=1: reads .* rows, the text has"):
    finetuned.train(config, (), start, first_step=10**7)


@pytest.mark.slow
def test_a_committed_table_has_every_row_of_the_plan():
  rows = {row["config"] for row in read_table(Path(run.__file__).parent / "table.csv")}
  if not rows:
    pytest.skip("paretoq has not been run")
  assert {GridRun.of(TrainConfig(), point).digest for point in planned(run, "cpu")} <= rows
