"""The study of native sparse attention: its verdicts from made-up rows, and equal models."""

import pytest

from experiments.nsa_vs_full import run
from jaxlm.scaling.flops import parameter_count
from pallas_kernels.common.errors import UserError

FOUND = {"full": 0.98, "nsa": 0.97, "window": 0.2}
LOSS = {"full": 2.0, "nsa": 2.005, "window": 2.02}


def rows_of(found, loss):
  rows = []
  for kind in run.KINDS:
    for seed in range(3):
      same = {"task.kind": kind, "seed": seed, "parameters": 1000}
      accuracy = found[kind] - 0.001 * seed
      rows.append({"task.task": "needle", "accuracy": accuracy, "heldout_loss": None} | same)
      of_text = loss[kind] + 0.01 * seed
      rows.append({"task.task": "text", "heldout_loss": of_text, "accuracy": None} | same)
  return rows


@pytest.mark.parametrize(
  "found, loss, verdict",
  [
    ({}, {}, "reproduced"),
    ({"nsa": 0.6}, {}, "direction only"),
    ({"window": 0.7}, {}, "direction only"),
    ({"nsa": 0.2}, {}, "refuted"),
    ({}, {"nsa": 2.1}, "refuted"),
  ],
)
def test_the_verdict_follows_the_rows(found, loss, verdict):
  finding = run.conclude(rows_of(FOUND | found, LOSS | loss))
  assert finding.verdict == verdict
  assert any(line.startswith("needles found: full 0.97") for line in finding.lines)


def test_needles_that_nobody_finds_decide_nothing():
  with pytest.raises(UserError, match="full attention has not learnt"):
    run.conclude(rows_of(FOUND | {"full": 0.5}, LOSS))


@pytest.mark.parametrize("scale", run.PLANS)
def test_the_models_have_equally_many_parameters(scale):
  plan = run.PLANS[scale]
  models = [run.matched(kind, plan.D, plan.N, plan.V, plan.sparse) for kind in run.KINDS]
  full, sparse, window = (parameter_count(model).blocks for model in models)
  assert full == window and abs(full / sparse - 1) < (0.05 if scale == "smoke" else 0.01)
  assert models[1].pattern[1].mixer.window == models[2].pattern[1].mixer.window
