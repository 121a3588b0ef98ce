"""Laws of training in few bits: published shares, order and limits."""

import itertools
import math

import numpy as np
import pytest

from jaxlm.scaling.precision import KUMAR, PANFEROV, bootstrap_efficiency, fit_efficiency
from jaxlm.scaling.published import quest
from jaxlm.scaling.runs import Run


def test_precision_laws():
  assert KUMAR.effective_parameters(1.0, 1e9, 1e9, 1e9) == 1.0
  four = -math.expm1(-(4 / 2.6745 + 0.3037))
  assert KUMAR.effective_parameters(2.0, 4, 1e9, 1e9) == pytest.approx(2 * four)
  assert KUMAR.loss(1e9, 2e10, 4, 4, 4) > KUMAR.loss(1e9, 2e10, 8, 8, 8) > KUMAR.loss(1e9, 2e10)
  assert KUMAR.degradation(1e9, 4e10, 4) > KUMAR.degradation(1e9, 2e10, 4)
  losses = [PANFEROV.loss(1e9, 2e10, p) for p in ("1", "2", "3", "4", "16")]
  assert losses == sorted(losses, reverse=True)
  per_bit = {p: PANFEROV.efficiency[p] / int(p) for p in ("1", "2", "3", "4", "8")}
  np.testing.assert_allclose(
    list(per_bit.values()), [0.0205, 0.0759, 0.1444, 0.1730, 0.1270], atol=6e-5
  )
  with pytest.raises(ValueError, match="precision='5': must be one of 16, 1, 2"):
    PANFEROV.loss(1e9, 2e10, "5")


@pytest.fixture(scope="module")
def fit_of_published():
  """Takes squared errors, as the paper does."""
  return fit_efficiency(quest(), delta=1.0)


def test_published_efficiencies_are_found_again(fit_of_published):
  fit = fit_of_published
  for name, value in PANFEROV.efficiency.items():
    assert fit.law.efficiency[name] == pytest.approx(value, abs=0.01), name
  assert fit.law.base.alpha == pytest.approx(PANFEROV.base.alpha, abs=2e-3)
  with pytest.raises(ValueError, match="reference='32': must be one of 1, 16"):
    fit_efficiency(quest(), reference="32")


def test_one_run_says_what_its_format_is_worth():
  """LSQ's eff in the paper's table 2 are those of its losses at 30M (table 1; plots.ipynb)."""
  losses = {3.598: 0.12, 3.41: 0.32, 3.315: 0.56, 3.2305: 0.87}
  for loss, eff in losses.items():
    assert PANFEROV.efficiency_of(30_482_560, loss - 3.2071) == pytest.approx(eff, abs=0.02)


@pytest.mark.slow
def test_intervals_hold_what_a_noisy_table_was_drawn_from():
  """Also where the formats at one size and duration share most of their noise."""
  rng, runs = np.random.default_rng(0), []
  for N, ratio in itertools.product((3e7, 1e8, 3e8), (25, 100)):
    shared = rng.normal(0, 2e-3)
    for name in ("16", "4", "2"):
      loss = PANFEROV.loss(N, ratio * N, name) * math.exp(shared + rng.normal(0, 1e-3))
      run = Run(loss=loss, tokens=ratio * N, body=N, precision=name, group=f"{N} {ratio}")
      runs.append(run)
  fit = fit_efficiency(runs, delta=1.0)
  for by in ("run", "group"):
    laws = bootstrap_efficiency(fit, samples=100, by=by)
    low, high = np.quantile([law.efficiency["4"] for law in laws], [0.005, 0.995])
    assert 0.5 < low < PANFEROV.efficiency["4"] < high < 0.9 and high - low > 0.01, by


def test_each_drawn_table_has_all_formats(fit_of_published):
  in_8_bits = [run for run in fit_of_published.runs if run.precision == "8"]
  assert len(in_8_bits) == 3  # of 88: often none of them is drawn
  laws = bootstrap_efficiency(fit_of_published, samples=40, seed=2)
  worth = [law.efficiency["8"] for law in laws]
  assert all(0.9 < value < 1.15 for value in worth) and max(worth) - min(worth) > 0.02
  assert fit_of_published.law.efficiency["8"] not in worth  # where a fit without it would stay
