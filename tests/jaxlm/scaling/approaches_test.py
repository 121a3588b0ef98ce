"""All estimates of the exponent from one table."""

import dataclasses
import math

import numpy as np
import pytest

from jaxlm.scaling.approaches import compare, curves_of, summary
from jaxlm.scaling.laws import BESIROGLU
from jaxlm.scaling.runs import Run
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def runs():
  """Runs without noise at five budgets, sizes from one ladder, so that sizes make curves."""
  runs = []
  ladder = np.geomspace(1e8, 4e11, 25)
  for C in (1e20, 1e21, 1e22, 1e23, 1e24):
    near = [N for N in ladder if abs(math.log(N / BESIROGLU.allocate(C).N)) < 2.5]
    for N in near:
      D = C / 6 / N
      runs.append(Run(loss=BESIROGLU.loss(N, D), tokens=D, total=N, flops=C))
  return runs


@pytest.mark.slow
def test_all_methods_find_the_exponent_of_a_law_without_noise(runs):
  estimates = {e.method: e for e in compare(runs, window=1.5, samples=20)}
  a = BESIROGLU.exponent
  assert estimates["3: chinchilla"].exponent == pytest.approx(a, abs=1e-4)
  assert estimates["joint: coupled"].exponent == pytest.approx(a, abs=1e-3)
  assert estimates["2: IsoFLOP"].exponent == pytest.approx(a, abs=0.02)
  assert estimates["1: envelope"].exponent == pytest.approx(a, abs=0.06)
  assert estimates["3: tied"].exponent == 0.5
  for estimate in estimates.values():
    low, high = estimate.interval
    assert low - 1e-6 <= estimate.exponent <= high + 1e-6
  lines = summary(list(estimates.values()))
  assert len(lines) == len(estimates) + 2 and "apart" in lines[-1]


def test_a_method_that_refuses_says_why_and_the_others_go_on(runs):
  two = [run for run in runs if run.flops < 1e22]
  by_method = {e.method: e for e in compare(two, families=(), samples=2)}
  assert math.isnan(by_method["2: IsoFLOP"].exponent)
  assert "a line needs three budgets" in by_method["2: IsoFLOP"].note
  assert by_method["1: envelope"].exponent == pytest.approx(BESIROGLU.exponent, abs=0.06)
  assert any("three budgets" in line for line in summary(list(by_method.values())))


def test_curves_average_equal_runs_and_refuse_unended_schedules(runs):
  doubled = [*runs, *(dataclasses.replace(run, loss=run.loss + 0.2) for run in runs)]
  plain, averaged = curves_of(runs, "total"), curves_of(doubled, "total")
  for one, two in zip(plain, averaged, strict=True):
    np.testing.assert_allclose(two.loss_X, one.loss_X + 0.1)
  with pytest.raises(UserError, match="1 of 60 were read|were read before their schedule ended"):
    curves_of([dataclasses.replace(runs[0], ended=False), *runs[1:]], "total")
