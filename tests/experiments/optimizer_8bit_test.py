"""The study of Adam in 8 bits: its verdicts from made-up rows, and how it counts bytes."""

import jax
import jax.numpy as jnp
import pytest

from experiments.optimizer_8bit import run
from jaxlm.config import OptimizerConfig
from jaxlm.train.optimizer import make_optimizer
from pallas_kernels.common.errors import UserError


def rows_of(over=0.0, noise=0.001, scales=8 / 256, coded=8192):
  """Returns rows of two models and three seeds, whose losses differ by `over` in 8 bits."""
  rows = []
  for size in (10_000, 20_000):
    for seed in range(3):
      loss = 2.0 + 0.05 * seed
      row = {"parameters": size, "seed": seed, "steps": 100, "seconds": 3.0, "coded": 0}
      row |= {"coded bytes": 0, "state bytes": 8 * size}
      rows.append(row | {"optimizer.name": "adamw", "heldout_loss": loss})
      row |= {"coded": coded, "coded bytes": coded * (1 + scales / 2), "state bytes": 3 * size}
      loss += over + noise * (seed - 1)
      rows.append(row | {"optimizer.name": "adam8bit", "heldout_loss": loss})
  return rows


@pytest.mark.parametrize(
  "rows, verdict",
  [
    (rows_of(), "reproduced"),
    (rows_of(over=-0.05), "reproduced"),
    (rows_of(over=0.005, noise=0.004), "direction only"),
    (rows_of(over=0.02), "refuted"),
    (rows_of(scales=0.2), "refuted"),
    (rows_of(over=0.012, noise=0.004), "undecided"),
  ],
)
def test_the_verdict_follows_the_rows(rows, verdict):
  finding = run.conclude(rows)
  assert finding.verdict == verdict, finding
  assert finding.ours.startswith("20,000 parameters") and len(finding.lines) == 2


def test_rows_that_do_not_pair_decide_nothing():
  with pytest.raises(UserError, match="seeds of 20000 parameters"):
    run.conclude(rows_of()[:-1])
  with pytest.raises(UserError, match="nothing of the state has 8 bits"):
    run.conclude(rows_of(coded=0))


def test_bytes_are_those_of_the_arrays():
  params = {"large": jnp.zeros((64, 100)), "embed": jnp.zeros((64, 100)), "small": jnp.zeros(100)}
  roles = {"large": "matrix", "embed": "embedding", "small": "norm"}
  states = {}
  for name in run.NAMES:
    optimizer = make_optimizer(OptimizerConfig(name=name), roles)
    states[name] = run.count_state(jax.eval_shape(optimizer.init, params))
  full, coded = states.values()
  assert full == {"state bytes": 4 + 8 * (6400 + 6400 + 100), "coded": 0, "coded bytes": 0}
  assert coded["coded"] == 2 * 6400 and coded["coded bytes"] == 2 * (6400 + 25 * 4)
  assert coded["state bytes"] == 4 + coded["coded bytes"] + 8 * (6400 + 100)
