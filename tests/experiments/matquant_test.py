"""The study of nested widths: its verdicts from made-up rows, its plan, and what it rounds."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import finetuned
from experiments.finetuned import Setup
from experiments.matquant import run
from jaxlm.config import TrainConfig
from jaxlm.config.formats import MatquantFormat
from jaxlm.scaling.flops import train_flops_per_token
from jaxlm.scaling.grid import GridRun
from jaxlm.scaling.sweep import read_table
from pallas_kernels.common.errors import UserError
from tests.experiments.planned import planned

ALONE = {8: 2.0, 6: 2.0, 4: 2.01, 3: 2.05, 2: 2.3}
SLICED = {8: 2.0, 6: 2.0, 4: 2.05, 3: 2.4, 2: 4.0}
JOINT = {8: 2.01, 6: 2.01, 4: 2.02, 3: 2.1, 2: 2.2}


def rows_of(joint=JOINT, sliced=SLICED, pyramid=-0.02):
  rows = []
  for point in planned(run, "cpu"):
    seed, training = point["task.seed"], point.get("task.training")
    noise = 0.0005 * np.sin(7 * seed + len(rows)) + 0.05 * seed
    if training is None:
      bits = [int(b) for b in point["task.mix"].split("-")]
      mean, order = float(np.mean(bits)), point["task.order"]
      loss = 2.4 - 0.05 * mean + pyramid * (order == "pyramid") + noise
      rows.append(point | {"mean_bits": mean, "mix_loss": loss})
      continue
    losses = sliced if training in (run.SLICED, run.UNTRAINED) else joint
    if training in run.ALONE and training != run.SLICED:
      losses = {run.ALONE[training]: ALONE[run.ALONE[training]]}
    columns = {f"int{bits}": loss + noise for bits, loss in losses.items()}
    if training in (run.PLAIN, run.UNTRAINED):
      columns["full"] = 2.0 + noise
    if training == "extra precision":
      columns |= {f"bits{bits}": bits + 0.05 for bits in run.WIDTHS[1:]}
    rows.append(point | columns)
  return rows


@pytest.mark.parametrize(
  "changed, verdict, why",
  [
    ({}, "reproduced", "int2 gains, int8 and int4 cost less than 0.02"),
    ({"joint": JOINT | {8: 2.1}}, "direction only", "int2 is better than alone; the others pay"),
    ({"joint": JOINT | {2: 2.301}}, "direction only", "int2 is as good as alone"),
    ({"sliced": SLICED | {2: 2.4}}, "direction only", "int2 is better than alone"),
    ({"joint": JOINT | {2: 2.4}}, "refuted", "worse than int2 alone by over 0.01"),
    ({"sliced": SLICED | {2: 2.1}}, "refuted", "only sliced are better"),
    ({"joint": JOINT | {2: 2.31}}, "undecided", "The intervals at int2 hold 0.01"),
  ],
)
def test_the_verdict_follows_the_rows(changed, verdict, why):
  finding = run.conclude(rows_of(**changed))
  assert finding.verdict == verdict and why in finding.why, finding
  (gap,) = [line for line in finding.lines if "increasing over pyramid" in line]
  assert "+0.020" in gap
  assert any(line.startswith("extra precision stores 2.050 bits") for line in finding.lines)


def test_runs_that_are_missing_decide_nothing():
  rows = rows_of()
  with pytest.raises(UserError, match="each training is needed for each seed"):
    run.conclude([row for row in rows if row.get("task.training") != "int3 alone"])
  with pytest.raises(UserError, match="seeds=1: two are needed"):
    run.conclude([row for row in rows if row["task.seed"] == 0])


SIZES = [("smoke", 2e11), ("cpu", 1.3e13), pytest.param("gpu", 1e17, marks=pytest.mark.slow)]
"""training FLOPs at most"""


@pytest.mark.parametrize("scale, most", SIZES)
def test_what_is_trained_fits_its_time(scale, most):
  """Each width of a joint training is a run of the model."""
  points = [point for point in planned(run, scale) if "task.training" in point]
  first = points[0]
  setup = Setup(**{k: first[f"task.{k}"] for k in Setup._fields})
  config = finetuned.from_scratch(scale, setup, setup.steps)
  passes = sum(
    run.NESTED[n].passes if (n := p["task.training"]) in run.NESTED else 1 for p in points
  )
  seeds = len({p["task.seed"] for p in points})
  tokens = (setup.steps * seeds + first["task.tuned"] * passes) * config.batch * config.data.length
  assert tokens * train_flops_per_token(config.model, config.data.length) < most


def test_each_point_has_a_row_of_its_own():
  points = planned(run, "smoke")
  assert len({GridRun.of(TrainConfig(), point).digest for point in points}) == len(points)


def test_each_layer_is_rounded_to_its_bits_and_bits_of_the_extra_level_are_counted():
  w_RDF = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
  params = {
    "stacks": {"0": {"q": {"weight": w_RDF}, "norm": {"weight": w_RDF[:, 0]}}},
    "head": w_RDF,
  }
  formats = [MatquantFormat(bits=2), MatquantFormat(bits=8)]
  got = jax.device_get(run.rounded(params, formats))
  low, high = w_RDF.min(axis=1, keepdims=True), w_RDF.max(axis=1, keepdims=True)
  codes = np.round((w_RDF - low) / (high - low) * 255)
  first = np.minimum(np.floor(codes[0] / 64 + 0.5), 3) * 64
  want = np.stack([first, codes[1]]) * (high - low) / 255 + low
  np.testing.assert_allclose(got["stacks"]["0"]["q"]["weight"], want, atol=1e-5)
  np.testing.assert_array_equal(got["stacks"]["0"]["norm"]["weight"], w_RDF[:, 0])
  np.testing.assert_array_equal(got["head"], w_RDF)
  assert run.stored_bits(params, 2) == pytest.approx(2 + np.mean(codes >= 224))


@pytest.mark.slow
def test_a_committed_table_has_every_row_of_the_plan():
  rows = {row["config"] for row in read_table(Path(run.__file__).parent / "table.csv")}
  if not rows:
    pytest.skip("matquant has not been run")
  assert {GridRun.of(TrainConfig(), point).digest for point in planned(run, "cpu")} <= rows
