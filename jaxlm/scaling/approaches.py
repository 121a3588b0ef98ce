"""Estimates the exponent a of N_opt ~ C^a from one table of runs in every way, side by side.

Approaches 1 to 3 are those of Hoffmann et al. (arXiv:2203.15556, section 3): the envelope of
training curves, parabolas at equal FLOPs, and a law of N and D; the joint forms are further laws.
Where they disagree, their spread is the error that no single interval shows.
"""

# N parameters, D training tokens, C training FLOPs, X runs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.scaling.bootstrap import bootstrap
from jaxlm.scaling.fit import NUMBERS, Family, fit_law, run_costs
from jaxlm.scaling.isoflop import Curve, fit_envelope, fit_isoflop
from jaxlm.scaling.laws import Counts
from jaxlm.scaling.runs import Run
from pallas_kernels.common.errors import UserError


class Estimate(NamedTuple):
  """Holds one estimate of the exponent; NaN where the table does not allow it, and `note` why."""

  method: str
  exponent: float
  interval: tuple[float, float]
  """95 %"""
  note: str


def compare(
  runs: Sequence[Run],
  *,
  counts: Counts = "total",
  window: float = 1.0,
  delta: float = 1e-3,
  families: Sequence[Family] = tuple(NUMBERS),
  samples: int = 300,
  seed: int = 0,
) -> list[Estimate]:
  """Returns the estimates of approaches 1, 2, 3 and of the joint forms, from the same runs.

  Approach 1 joins the runs of one size to a curve, so that each must have ended its schedule; its
  interval draws sizes with replacement, approach 2's runs within budgets, the others' runs. A
  method that refuses the table has its reason as a note.
  """
  estimates = [_envelope(runs, counts, samples, seed)]
  try:
    line = fit_isoflop(runs, counts=counts, window=window, samples=samples, seed=seed)
    good = sum(vertex.verdict == "minimum" for vertex in line.vertices)
    note = f"{good} of {len(line.vertices)} budgets have a minimum; window {window:g} in ln N"
    estimates.append(Estimate("2: IsoFLOP", line.exponent, line.interval, note))
  except UserError as error:
    estimates.append(_refused("2: IsoFLOP", error))
  for family in families:
    method = f"3: {family}" if family in ("chinchilla", "tied") else f"joint: {family}"
    try:
      fit = fit_law(runs, family, counts=counts, delta=delta)
      interval = bootstrap(fit, samples, seed=seed).interval(lambda law: law.exponent)
      note = f"E {fit.law.E:.4g}, residuals {fit.root_mean_square:.2%}, Huber delta {delta:g}"
      estimates.append(Estimate(method, fit.law.exponent, interval, note))
    except UserError as error:
      estimates.append(_refused(method, error))
  return estimates


def curves_of(runs: Sequence[Run], counts: Counts) -> list[Curve]:
  """Returns a curve of loss over FLOPs for each size; runs of equal size and tokens are averaged.

  Raises UserError for a run that was read before its schedule ended.
  """
  early = sum(not run.ended for run in runs)
  if early:
    raise UserError(f"runs: {early} of {len(runs)} were read before their schedule ended")
  costs_X = run_costs(runs, counts)
  losses: dict[float, dict[float, list[tuple[float, float]]]] = {}
  for run, cost in zip(runs, costs_X):
    of_size = losses.setdefault(run.parameters(counts), {})
    of_size.setdefault(run.tokens, []).append((cost, run.loss))
  curves = []
  for N, of_size in losses.items():
    points = sorted(tuple(np.mean(pairs, axis=0)) for pairs in of_size.values())
    if len(points) > 1:
      flops, loss = np.array(points).T
      curves.append(Curve(N, flops, loss))
  return curves


def _envelope(runs: Sequence[Run], counts: Counts, samples: int, seed: int) -> Estimate:
  method = "1: envelope"
  costs_X = run_costs(runs, counts)
  budgets = np.geomspace(costs_X.min(), costs_X.max(), 40).tolist()
  try:
    curves = curves_of(runs, counts)
    exponent, _ = fit_envelope(curves, budgets)
  except UserError as error:
    return _refused(method, error)
  rng = np.random.default_rng(seed)
  exponents = []
  for _ in range(samples):
    drawn = {int(i) for i in rng.integers(len(curves), size=len(curves))}
    try:
      exponents.append(fit_envelope([curves[i] for i in drawn], budgets)[0])
    except UserError:
      continue
  low, high = np.quantile(exponents or [math.nan], [0.025, 0.975])
  note = f"{len(curves)} curves; {len(exponents)} of {samples} resamples have a line"
  return Estimate(method, exponent, (float(low), float(high)), note)


def _refused(method: str, error: UserError) -> Estimate:
  return Estimate(method, math.nan, (math.nan, math.nan), str(error))


def summary(estimates: Sequence[Estimate]) -> list[str]:
  """Returns a line for each estimate, and one on how far they lie apart."""
  lines = [f"{'method':<18}{'a':>7}   {'95 %':<16}"]
  for estimate in estimates:
    if math.isnan(estimate.exponent):
      lines.append(f"{estimate.method:<18}{'-':>7}   {'':<16}{estimate.note}")
    else:
      between = "{:.3f} to {:.3f}".format(*estimate.interval)
      lines.append(f"{estimate.method:<18}{estimate.exponent:>7.3f}   {between:<16}{estimate.note}")
  values = [e.exponent for e in estimates if not math.isnan(e.exponent)]
  if len(values) > 1:
    lines.append(
      f"the methods lie {max(values) - min(values):.3f} apart, from {min(values):.3f} to "
      f"{max(values):.3f}"
    )
  return lines
