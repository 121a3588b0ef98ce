"""IsoFLOP fits: surfaces whose bias is known, published tables, budgets without a minimum."""

# N parameters, D training tokens, C training FLOPs

import dataclasses
import math

import numpy as np
import pytest

from jaxlm.scaling.isoflop import MINIMUM, Curve, design_error, fit_envelope, fit_isoflop
from jaxlm.scaling.laws import BESIROGLU, C4, HOFFMANN_ROUNDED
from jaxlm.scaling.published import porian, rows
from jaxlm.scaling.runs import Run
from jaxlm.scaling.verdict import isoflop_summary


def grid(law, width, *, centre=1.0, budgets=5, points=15, drift=0.0):
  """Noise-free runs of N* / width to width N* around a centre, which may drift with C."""
  runs = []
  for i, C in enumerate(np.logspace(17, 21, budgets)):
    middle = law.allocate(C).N * centre * math.exp(drift * i)
    for N in middle * np.geomspace(1 / width, width, points):
      runs.append(Run(loss=float(law.loss(N, C / 6 / N)), tokens=C / 6 / N, total=N, flops=C))
  return runs


@pytest.mark.parametrize(
  ("law", "ratios"),
  [
    (HOFFMANN_ROUNDED, (1.0033, 1.0132, 1.0299, 1.0537, 1.0120)),
    (BESIROGLU, (0.9990, 0.9961, 0.9912, 0.9844, 1.0522)),
    (C4, (1.0, 1.0, 1.0, 1.0, 1.0446)),
  ],
  ids=["unequal", "refit", "tied"],
)
def test_bias_of_parabolas(law, ratios):
  """Width and centre bias the intercept, not the exponent: fitted over true N_opt at 1e24 FLOPs."""
  for (width, centre), ratio in zip(((2, 1), (4, 1), (8, 1), (16, 1), (4, 3)), ratios):
    fit = fit_isoflop(grid(law, width, centre=centre), window=99, samples=1)
    assert fit.exponent == pytest.approx(law.exponent, abs=1e-5)
    assert fit.parameters_at(1e24) / law.allocate(1e24).N == pytest.approx(ratio, abs=6e-5)


def test_a_drifting_centre_biases_the_exponent():
  fit = fit_isoflop(grid(BESIROGLU, 4, drift=0.2), window=99, samples=1)
  assert abs(fit.exponent - BESIROGLU.exponent) > 1e-3


PUBLISHED = {
  row["stage"].split("_")[0]: float(row["a_published"])
  for row in rows("porian_published_exponents_refinedweb")
}


@pytest.mark.parametrize("stage", ["2", "2a", "3", "3a", "4", "4a", "5", "5a"])
def test_ladder_of_faults(stage):
  """Each fault of method is worth 0.03 to 0.13 in the exponent; windows differ by 0.02."""
  fit = fit_isoflop(porian(stage), samples=100)
  assert fit.exponent == pytest.approx(PUBLISHED[stage], abs=0.022)
  low, high = fit.interval
  assert low < fit.exponent < high
  assert sum(vertex.verdict == MINIMUM for vertex in fit.vertices) >= 10


def test_wide_windows_move_the_exponent():
  narrow, whole = (fit_isoflop(porian("2"), window=w, samples=1).exponent for w in (1.0, 99.0))
  assert whole > narrow + 0.01


def test_budgets_without_a_minimum_say_why():
  law = BESIROGLU
  good = grid(law, 4)
  budget = max(run.flops for run in good)
  cut = [run for run in good if run.flops < budget or run.total > 1.1 * law.allocate(budget).N]
  fit = fit_isoflop(cut, samples=1)
  last = fit.vertices[-1]
  assert last.verdict == "least loss at an end of the grid" and math.isnan(last.N)
  assert "least loss at an end of the grid" in "\n".join(isoflop_summary(fit, 1e22))
  bent = [dataclasses.replace(run, loss=6.0 - run.loss) for run in good]
  with pytest.raises(ValueError, match="three budgets with a minimum, there are 0"):
    fit_isoflop(bent, samples=1)
  few = [run for i, run in enumerate(good) if i % 15 in (6, 7, 8)]
  with pytest.raises(ValueError, match="fewer than 4 sizes in the window"):
    fit_isoflop(few, samples=1)


def test_nearly_equal_flops_are_one_budget():
  shaken = [
    dataclasses.replace(run, flops=run.flops * (1 + 0.004 * (i % 3)))
    for i, run in enumerate(grid(BESIROGLU, 4))
  ]
  assert len(fit_isoflop(shaken, samples=1).vertices) == 5


def test_envelope_of_curves():
  """Smooth curves of 40 sizes: the least of each budget follows the law's optimum."""
  law = BESIROGLU
  curves = []
  for N in np.geomspace(1e7, 1e11, 40):
    D = np.geomspace(1e8, 1e13, 400)
    curves.append(Curve(N, 6 * N * D, law.loss(N, D)))
  exponent, _ = fit_envelope(curves, np.geomspace(1e18, 1e22, 60))
  assert exponent == pytest.approx(law.exponent, abs=0.02)
  with pytest.raises(ValueError, match="budgets=0: three with a model between others"):
    fit_envelope(curves[:2], [1e18, 1e19, 1e20])


def test_error_of_a_planned_grid():
  """Standard errors at 1e14 FLOPs, from simulations on record, by noise and seeds."""
  two, four = 1e14 * 2.0 ** np.arange(5), 1e14 * 4.0 ** np.arange(4)
  narrow, wide = np.geomspace(0.25, 4, 6), np.geomspace(0.125, 8, 7)
  expected = [
    (two, narrow, 0.003, 1, 0.006),
    (two, narrow, 0.01, 1, 0.0205),
    (two, narrow, 0.01, 3, 0.0115),
    (two, wide, 0.003, 1, 0.0045),
    (two, wide, 0.01, 3, 0.008),
    (four, narrow, 0.01, 1, 0.015),
  ]
  for budgets, factors, noise, seeds, error in expected:
    found = design_error(BESIROGLU, budgets, factors, noise=noise, seeds=seeds)
    assert found == pytest.approx(error, rel=0.15)


def test_a_fit_of_many_noisy_grids_has_that_error():
  law, rng = BESIROGLU, np.random.default_rng(0)
  budgets, factors = 1e14 * 2.0 ** np.arange(5), np.geomspace(0.25, 4, 6)
  exponents = []
  for _ in range(60):
    runs = []
    for C in budgets:
      for factor in factors:
        N = law.allocate(C).N * factor
        loss = float(law.loss(N, C / 6 / N)) * (1 + 0.003 * rng.standard_normal())
        runs.append(Run(loss=loss, tokens=C / 6 / N, total=N, flops=C))
    exponents.append(fit_isoflop(runs, window=99, samples=1).exponent)
  planned = design_error(law, budgets, factors, noise=0.003)
  assert 0.75 * planned < np.std(exponents) < 1.5 * planned
