"""The study of training-free patterns: its verdicts from made-up rows, and what patterns read."""

import jax
import numpy as np
import pytest

from experiments.sparse_frontier import run
from experiments.sparse_frontier.patterns import CACHE, MASS, PREFILL, read_answers
from experiments.synthetic import mixer, stacked
from jaxlm.models import Transformer
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

QUEST, OTHERS, LINES = 0.97, 0.9, 0.6


def rows_of(kept, shorter=0.05, dense=0.98):
  """Returns rows of two lengths and three seeds; `kept` maps patterns to what they keep."""
  rows = []
  for length in (64, 128):
    for seed in range(3):
      row = {"data.length": length, "seed": seed}
      for name in run.TASKS:
        row[f"{name} dense accuracy"] = dense
        for pattern in PREFILL | CACHE:
          for share in MASS:
            value = dense * kept[pattern] - shorter * (length == 64) - 0.001 * seed
            row |= {f"{name} {pattern} {share:g} accuracy": value}
            row |= {f"{name} {pattern} {share:g} density": share}
      rows.append(row)
  return rows


KEPT = dict.fromkeys(PREFILL, LINES) | dict.fromkeys(CACHE, OTHERS) | {"Quest": QUEST}


@pytest.mark.parametrize(
  "kept, shorter, verdict",
  [
    ({}, 0.05, "reproduced"),
    ({}, 0.0, "direction only"),
    ({"Quest": 0.7}, 0.05, "direction only"),
    (dict.fromkeys(PREFILL, 0.95), 0.05, "refuted"),
    (dict.fromkeys(CACHE, 0.5), 0.05, "refuted"),
  ],
)
def test_the_verdict_follows_the_rows(kept, shorter, verdict):
  finding = run.conclude(rows_of(KEPT | kept, shorter))
  assert finding.verdict == verdict
  assert any(line.startswith("Quest, density 0.125: needle") for line in finding.lines)


def test_models_that_know_no_task_decide_nothing():
  with pytest.raises(UserError, match="has not learnt a task"):
    run.conclude(rows_of(KEPT, dense=0.7))


@pytest.fixture(scope="module")
def task():
  config = run.answers_config(steps=40, batch=6, length=64)
  return run.make_task(config, V=24, names=8, D=8)[1]


def test_rows_of_training_hold_every_task(task):
  batch = next(task.batches(slice(0, 6)))
  np.testing.assert_array_equal(batch.weights_BT.sum(axis=1), [4, 4, 1, 1, 1, 1])
  asks = [int(np.flatnonzero(row == 0)[-1]) for row in batch.inputs_BT]
  assert asks == [62, 62, 62, 62, 63, 63]  # a name follows, but for the most common name


@pytest.fixture(scope="module")
def model():
  made = Transformer(stacked([mixer("conv", 8), mixer("attention", 8, N=2)], 8, 24, F=8))
  return made, made.init(jax.random.key(0))


IDS_BT = np.random.default_rng(0).integers(0, 24, (2, 32)).astype(np.int32)


def check_pattern(model, pattern, share):
  logits_BTV = jax.jit(model[0].apply)(model[1], IDS_BT)
  answers_B, density = read_answers(*model, IDS_BT, pattern=pattern, share=share)
  np.testing.assert_array_equal(answers_B, np.argmax(logits_BTV[:, -1], axis=-1))
  np.testing.assert_allclose(density, 1.0, rtol=1e-6)


def test_the_dense_pattern_reads_what_the_model_predicts(model):
  check_pattern(model, "dense", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "pattern, share",
  [("vertical-slash", 2.0), ("block-sparse", 1.0), *((pattern, 1.0) for pattern in CACHE)],
)
def test_a_pattern_that_keeps_everything_reads_the_same(model, pattern, share):
  check_pattern(model, pattern, share)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PREFILL | CACHE)
def test_a_small_share_keeps_few_keys(model, pattern):
  assert 0.02 < read_answers(*model, IDS_BT, pattern=pattern, share=1 / 8)[1] < 0.75
