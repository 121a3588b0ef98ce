"""Reads the compute-optimal size from runs of equal budgets: a parabola each, then a line through.

Approach 2 of Hoffmann et al. (arXiv:2203.15556, section 3.2). Width and centre of the grids bias
it: with grids of N* / w to w N* noise-free losses give 1.3 % too much at w = 4, and a centre that
drifts with the budget changes the exponent itself. A budget whose minimum lies at an end of its
grid has no minimum, and says so.
"""

# N parameters, D training tokens, C training FLOPs, K runs of one budget, R resamples

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import check
from jaxlm.scaling.fit import run_costs
from jaxlm.scaling.laws import Counts, SumLaw
from jaxlm.scaling.runs import Run, check_comparable
from pallas_kernels.common.errors import UserError

MINIMUM = "minimum"


class Vertex(NamedTuple):
  """Holds what one budget says; N, D and loss are NaN unless the verdict is "minimum"."""

  budget: float
  N: float
  D: float
  loss: float
  deviation: float
  """standard deviation of ln N"""
  runs: int
  """within the window around the least loss"""
  verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoflopFit:
  """Holds N_opt = coefficient C^exponent and the budgets that it was read from."""

  exponent: float
  interval: tuple[float, float]
  """of the exponent, 95 %, by drawing runs within budgets"""
  coefficient: float
  counts: Counts
  window: float
  vertices: tuple[Vertex, ...]
  warnings: tuple[str, ...]

  def parameters_at(self, C: float) -> float:
    """Returns N_opt of a budget."""
    return self.coefficient * C**self.exponent


def fit_isoflop(
  runs: Sequence[Run],
  *,
  counts: Counts = "total",
  window: float = 1.0,
  samples: int = 1000,
  seed: int = 0,
) -> IsoflopFit:
  """Returns the line of ln N_opt over ln C through the vertices of all budgets.

  Runs whose FLOPs agree within 2 % are one budget. Within it, a parabola in ln N is fitted to the
  losses of runs at most `window` from the least loss's ln N; the line weighs each vertex by its
  variance. Raises UserError where fewer than three budgets have a minimum.
  """
  check(window > 0, "window", window, "must be positive, in ln N")
  warnings = check_comparable(runs, counts)
  budgets = _budgets(runs, counts)
  vertices = tuple(_vertex(C, log_N_K, loss_K, window) for C, log_N_K, loss_K in budgets)
  good = [vertex for vertex in vertices if vertex.verdict == MINIMUM]
  if len(good) < 3:
    verdicts = collections.Counter(v.verdict for v in vertices)
    counted = "; ".join(f"{verdict}: {count}" for verdict, count in verdicts.items())
    raise UserError(
      f"runs: a line needs three budgets with a minimum, there are {len(good)} ({counted})"
    )
  exponent, intercept = _line(good)
  rng = np.random.default_rng(seed)
  exponents = []
  for _ in range(samples):
    drawn = []
    for C, log_N_K, loss_K in budgets:
      picked = rng.integers(len(loss_K), size=len(loss_K))
      drawn.append(_vertex(C, log_N_K[picked], loss_K[picked], window))
    drawn = [vertex for vertex in drawn if vertex.verdict == MINIMUM]
    if len(drawn) >= 3:
      exponents.append(_line(drawn)[0])
  if len(exponents) < 0.9 * samples:
    warnings.append(f"{samples - len(exponents)} of {samples} resamples have no line")
  low, high = np.quantile(exponents or [math.nan], [0.025, 0.975])
  return IsoflopFit(
    exponent=exponent,
    interval=(float(low), float(high)),
    coefficient=math.exp(intercept),
    counts=counts,
    window=window,
    vertices=vertices,
    warnings=tuple(warnings),
  )


class Curve(NamedTuple):
  """Holds the losses [X] of one model while it trains, with the FLOPs spent until then."""

  N: float
  flops_X: np.ndarray
  loss_X: np.ndarray


def fit_envelope(curves: Sequence[Curve], budgets: Sequence[float]) -> tuple[float, float]:
  """Returns exponent and coefficient of N_opt = coefficient C^exponent (approach 1).

  At each budget the model with the least loss counts, unless it is the smallest or largest that
  reaches the budget. The schedule of each curve must end where it is read, or losses in the middle
  of a decay flatter the small models. Raises UserError where fewer than three budgets remain.
  """
  optima = []
  for C in budgets:
    reached = [curve for curve in curves if curve.flops_X[0] <= C <= curve.flops_X[-1]]
    reached.sort(key=lambda curve: curve.N)
    losses = [np.interp(math.log(C), np.log(c.flops_X), c.loss_X) for c in reached]
    best = int(np.argmin(losses)) if losses else 0
    if 0 < best < len(losses) - 1:
      optima.append((math.log(C), math.log(reached[best].N)))
  check(len(optima) >= 3, "budgets", len(optima), "three with a model between others are needed")
  log_C, log_N = np.array(optima).T
  slope, intercept = np.polyfit(log_C, log_N, 1)
  return float(slope), math.exp(intercept)


def design_error(
  law: SumLaw,
  budgets: Sequence[float],
  factors: Sequence[float],
  *,
  noise: float,
  seeds: int = 1,
  simulations: int = 600,
  seed: int = 0,
) -> float:
  """Returns the standard error of the exponent that a planned grid will give, before it is run.

  Each budget has models of N_opt times the factors, with `seeds` runs each whose loss varies by the
  relative standard deviation `noise`. What counting, tuning, window and schedule do to the exponent
  (0.03 to 0.15 in published data) comes on top.
  """
  rng = np.random.default_rng(seed)
  log_C = np.log(budgets)
  best = np.array([law.allocate(C).N for C in budgets])
  N_CK = best[:, None] * np.asarray(factors)
  loss_CK = law.loss(N_CK, np.asarray(budgets)[:, None] / 6 / N_CK)
  shape = (simulations, *loss_CK.shape)
  losses_RCK = loss_CK * (1 + noise / math.sqrt(seeds) * rng.standard_normal(shape))
  design_KP = np.vander(np.log(factors), 3)
  a, b, _ = np.moveaxis(losses_RCK @ np.linalg.pinv(design_KP).T, -1, 0)
  vertices_RC = np.log(best) - b / (2 * a)
  centred_C = log_C - log_C.mean()
  return float((vertices_RC @ centred_C / np.sum(centred_C**2)).std(ddof=1))


Budget = tuple[float, np.ndarray, np.ndarray]


def _budgets(runs: Sequence[Run], counts: Counts) -> list[Budget]:
  """Returns (C, ln N [K], loss [K]) of each budget, in their order."""
  costs_X = run_costs(runs, counts)
  budgets: list[list[int]] = []
  for i in np.argsort(costs_X, kind="stable"):
    if budgets and costs_X[i] <= 1.02 * costs_X[budgets[-1][0]]:
      budgets[-1].append(int(i))
    else:
      budgets.append([int(i)])
  return [
    (
      float(np.mean(costs_X[members])),
      np.log([runs[i].parameters(counts) for i in members]),
      np.array([runs[i].loss for i in members]),
    )
    for members in budgets
  ]


def _vertex(C: float, log_N_K: np.ndarray, loss_K: np.ndarray, window: float) -> Vertex:
  """Returns the vertex of one budget's parabola, or why there is none."""
  least = int(np.argmin(loss_K))
  near_K = np.abs(log_N_K - log_N_K[least]) <= window
  x_K, y_K = log_N_K[near_K] - log_N_K[least], loss_K[near_K]

  def no(verdict: str) -> Vertex:
    return Vertex(C, math.nan, math.nan, math.nan, math.nan, len(x_K), verdict)

  if len(np.unique(np.round(x_K, 9))) < 4:
    return no("fewer than 4 sizes in the window")
  if log_N_K[least] in (log_N_K.min(), log_N_K.max()):
    return no("least loss at an end of the grid")
  design_KP = np.vander(x_K, 3)
  numbers, rest, *_ = np.linalg.lstsq(design_KP, y_K, rcond=None)
  a, b, c = numbers
  if a <= 0:
    return no("losses bend down")
  x = -b / (2 * a)
  if not x_K.min() < x < x_K.max():
    return no("vertex outside the sizes in the window")
  variance = float(np.sum((design_KP @ numbers - y_K) ** 2)) / max(len(x_K) - 3, 1)
  slope_P = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
  spread = variance * slope_P @ np.linalg.inv(design_KP.T @ design_KP) @ slope_P
  N = math.exp(log_N_K[least] + x)
  return Vertex(C, N, C / 6 / N, float(c - b**2 / (4 * a)), math.sqrt(spread), len(x_K), MINIMUM)


def _line(vertices: Sequence[Vertex]) -> tuple[float, float]:
  """Returns slope and intercept of ln N over ln C, weighted by the vertices' precision.

  No vertex counts as more precise than the median: a parabola through few points may fit them by
  chance.
  """
  deviations = np.array([vertex.deviation for vertex in vertices])
  deviations = np.maximum(deviations, max(float(np.median(deviations)), 1e-12))
  log_C = np.log([vertex.budget for vertex in vertices])
  log_N = np.log([vertex.N for vertex in vertices])
  fit: Any = np.polyfit(log_C - log_C.mean(), log_N, 1, w=1 / deviations)
  return float(fit[0]), float(fit[1] - fit[0] * log_C.mean())
