"""The study of recall: its verdicts from made-up rows, and its task."""

import numpy as np
import pytest

from experiments.mqar import run
from experiments.synthetic import cache_numbers
from pallas_kernels.common.errors import UserError

SOLVED = {
  "attention": (0.3, 0.6),
  "conv + attention": (0.98, 1.0),
  "conv": (0.05, 0.06),
  "linear": (0.3, 0.5),
  "gated delta": (0.6, 0.99),
  "kda": (0.7, 0.99),
  "conv + nsa": (0.9, 1.0),
}


def rows_of(recall, step=600):
  return [
    {"task.layers": layers, "task.D": D, "task.pairs": 16, "seed": seed, "step": step}
    | {"accuracy": accuracy - lost, "state": 100 * D, "optimizer.learning_rate": rate}
    for layers, accuracies in recall.items()
    for D, accuracy in zip((16, 32), accuracies)
    for rate, lost in ((0.005, 0.3 * (D == 16)), (0.01, 0.3 * (D == 32)))
    for seed in (0, 1)
  ]


@pytest.mark.parametrize(
  "changed, verdict",
  [
    ({}, "reproduced"),
    ({"conv + attention": (0.8, 0.97), "kda": (0.5, 0.9)}, "direction only"),
    ({"linear": (0.95, 1.0)}, "refuted"),
    ({"conv": (0.9, 0.9)}, "refuted"),
    ({"conv + attention": (0.1, 0.4)}, "undecided"),
  ],
)
def test_the_verdict_follows_the_rows(changed, verdict):
  finding = run.conclude(rows_of(SOLVED | changed))
  assert finding.verdict == verdict
  assert ("does not recall 0.1 more than linear" in finding.why) == ("linear" in changed)
  assert any(line.startswith("kda: D 16") for line in finding.lines)


def test_each_part_of_the_claim_has_a_line_on_all_widths():
  lines = run.conclude(rows_of(SOLVED)).lines
  assert "kda: D 16 0.700 at rate 0.01, D 32 0.990 at rate 0.005" in lines
  assert "attention after a convolution recalls 0.980 of the pairs at its worst width" in lines
  assert "kda minus linear: D 16 +0.400, D 32 +0.490" in lines
  assert "kda minus gated delta: D 16 +0.100, D 32 +0.000" in lines


def test_runs_that_are_too_short_or_missing_decide_nothing():
  with pytest.raises(UserError, match="steps=30: recall is not learnt"):
    run.conclude(rows_of(SOLVED, step=30))
  with pytest.raises(UserError, match="all mixers are needed"):
    run.conclude(rows_of({"kda": (0.5, 0.9)}))


@pytest.mark.parametrize("layers", run.LAYERS)
def test_each_run_has_its_model_and_rows_that_repeat(layers):
  config, task = run.make_task(run.base("cpu"), layers, D=16, V=64, pairs=16)
  assert [spec.feedforward.F for spec in config.model.layer_specs] == [16, 16]
  first, again = (next(task.batches(slice(0, 32))) for _ in range(2))
  np.testing.assert_array_equal(first.inputs_BT, again.inputs_BT)
  assert first.weights_BT.sum() == 32 * 16
  states = {"attention": 2 * 2 * 64 * 16, "conv": 2 * 2 * 16}
  states["kda"] = states["gated delta"] = states["linear"] = 2 * (16 * 16 + 3 * 3 * 16)
  if layers in states:
    assert cache_numbers(config.model, 64) == states[layers]
