"""Fits loss laws to runs: all starts at once, with profiles and forecasts.

A fit is its estimator: the Huber threshold, the rule for outliers and the count of parameters all
move the answer, so that a `Fit` carries them. A and B are hardly ever identified; what a table can
say is the exponent a of N_opt ~ C^a, and how well a larger budget is predicted.
"""

# N parameters, D training tokens, C training FLOPs, X runs, P fitted numbers, S starts

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check
from jaxlm.scaling.laws import Counts, SumLaw
from jaxlm.scaling.runs import Run, check_comparable, column
from jaxlm.scaling.solver import minimize
from pallas_kernels.common.checks import check_choice
from pallas_kernels.common.errors import UserError

Family = Literal["chinchilla", "tied", "kaplan", "coupled"]
NUMBERS: dict[Family, tuple[str, ...]] = {
  "chinchilla": ("ln E", "ln A", "alpha", "ln B", "beta"),
  "tied": ("ln E", "ln A", "alpha", "ln B"),
  "kaplan": ("ln A", "alpha", "ln B", "k"),
  "coupled": ("ln E", "ln A", "alpha", "ln B", "beta", "k"),
}
"""What each family fits: "tied" has beta = alpha, "kaplan" E = 0 and beta = 1."""


class Data(NamedTuple):
  """Holds what all problems share; logarithms of N and D stand centred on their means."""

  log_N_X: Any
  log_D_X: Any
  log_loss_X: Any
  fixed_P: Any
  """a number to keep a parameter at, NaN to fit it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """Holds a fitted law and everything that the estimate depends on."""

  law: SumLaw
  family: Family
  objective: float
  """sum over runs of the Huber loss of residuals in ln loss"""
  delta: float
  runs: tuple[Run, ...]
  """those fitted"""
  dropped: tuple[Run, ...]
  """left out by the rule for outliers"""
  starts_agreeing: float
  """share of the starts that end within 0.1 % of the best objective"""
  root_mean_square: float
  """of residuals in ln loss"""
  warnings: tuple[str, ...]
  numbers_P: np.ndarray
  """of the centred form, where resamples start"""


def fit_law(
  runs: Sequence[Run],
  family: Family = "chinchilla",
  *,
  counts: Counts = "total",
  delta: float = 1e-3,
  drop_largest: int = 0,
) -> Fit:
  """Returns the law of this family with the least Huber loss of ln loss (arXiv:2203.15556, eq. 3).

  Args:
    counts: which parameters are N; runs that do not know them are refused.
    delta: Huber threshold in ln loss; part of the estimator. 1e-3 is close to least absolute
      deviations on most tables.
    drop_largest: how many of the largest losses are left out. State it before looking.

  Raises UserError for losses that do not compare and for fewer runs than fitted numbers.
  """
  check_choice("family", family, tuple(NUMBERS))
  check(delta > 0, "delta", delta, "must be positive")
  check(drop_largest >= 0, "drop_largest", drop_largest, "must not be negative")
  ordered = sorted(runs, key=lambda run: run.loss)
  used = ordered[: max(len(ordered) - drop_largest, 0)]
  dropped = ordered[len(used) :]
  needed = len(NUMBERS[family])
  check(len(used) > needed, "runs", len(used), f"{family} has {needed} numbers to fit: give more")
  warnings = check_comparable(used, counts)
  data, starts_SP = shared_data(used, counts, family), starting_points(used, family)
  weights_SX = np.ones((len(starts_SP), len(used)))
  ends = minimize(RESIDUALS[family], starts_SP, data, weights_SX, delta=delta)
  best = int(np.argmin(ends.objective))
  objective, numbers_P = float(ends.objective[best]), ends.numbers_P[best]
  law = law_of(family, numbers_P, used, counts)
  errors = prediction_errors(law, used)
  return Fit(
    law=law,
    family=family,
    objective=objective,
    delta=delta,
    runs=tuple(used),
    dropped=tuple(dropped),
    starts_agreeing=float(np.mean(ends.objective <= objective * 1.001)),
    root_mean_square=float(np.sqrt(np.mean(errors**2))),
    warnings=(*warnings, *_warnings(used, counts)),
    numbers_P=numbers_P,
  )


def profile(fit: Fit, number: str, values: Sequence[float]) -> np.ndarray:
  """Returns the least objective [len(values)] with one number kept at each value.

  `number` is E, alpha, beta or k. A flat profile means that the table does not say what it is.
  """
  names = NUMBERS[fit.family]
  choices = tuple("E" if n == "ln E" else n for n in names if n not in ("ln A", "ln B"))
  check_choice("number", number, choices)
  at = names.index("ln E" if number == "E" else number)
  data = shared_data(fit.runs, fit.law.counts, fit.family)
  starts_SP = np.concatenate([fit.numbers_P[None], starting_points(fit.runs, fit.family)])
  ones_SX = np.ones((len(starts_SP), len(fit.runs)))
  least = []
  for value in values:
    fixed_P = np.full(len(names), np.nan)
    fixed_P[at] = math.log(value) if number == "E" else value
    shared = data._replace(fixed_P=fixed_P)
    ends = minimize(RESIDUALS[fit.family], starts_SP, shared, ones_SX, delta=fit.delta)
    least.append(ends.objective.min())
  return np.array(least)


class Forecast(NamedTuple):
  """Holds how a law fitted below a budget predicts the runs above it."""

  cutoff: float
  """FLOPs of the dearest run that was fitted"""
  fitted: int
  predicted: int
  root_mean_square: float
  """of ln(predicted / measured)"""
  bias: float
  """mean of ln(predicted / measured): positive where the law expects too high a loss"""


def leave_future_out(fit: Fit, *, share: float = 0.7) -> Forecast:
  """Fits the cheapest `share` of the runs again and predicts the others."""
  costs_X = run_costs(fit.runs, fit.law.counts)
  cutoff = float(np.quantile(costs_X, share, method="lower"))
  past = [run for run, cost in zip(fit.runs, costs_X) if cost <= cutoff]
  future = [run for run, cost in zip(fit.runs, costs_X) if cost > cutoff]
  check(len(future) > 0, "share", share, "leaves no run to predict")
  law = fit_law(past, fit.family, counts=fit.law.counts, delta=fit.delta).law
  errors = prediction_errors(law, future)
  rms = float(np.sqrt(np.mean(errors**2)))
  return Forecast(cutoff, len(past), len(future), rms, float(errors.mean()))


def run_costs(runs: Sequence[Run], counts: Counts) -> np.ndarray:
  """Returns the training FLOPs of runs [X]: exact where all runs know them, else 6 N D."""
  if all(run.flops is not None for run in runs):
    return column(runs, "flops")
  return np.array([run.six_n_d(counts) for run in runs])


def prediction_errors(law: SumLaw, runs: Sequence[Run]) -> np.ndarray:
  """Returns ln(predicted / measured loss) of runs [X]."""
  N_X = np.array([run.parameters(law.counts) for run in runs])
  return np.log(law.loss(N_X, column(runs, "tokens")) / column(runs, "loss"))


def shared_data(runs: Sequence[Run], counts: Counts, family: Family) -> Data:
  """Returns the table as the solver takes it; raises UserError where N or D never changes."""
  log_N_X = np.log([run.parameters(counts) for run in runs])
  log_D_X = np.log(column(runs, "tokens"))
  for name, values_X in (("N", log_N_X), ("D", log_D_X)):
    if np.ptp(values_X) < 1e-9:
      raise UserError(f"runs: all have the same {name}, so that no law of {name} can be fitted")
  return Data(
    log_N_X - log_N_X.mean(),
    log_D_X - log_D_X.mean(),
    np.log(column(runs, "loss")),
    np.full(len(NUMBERS[family]), np.nan),
  )


def starting_points(runs: Sequence[Run], family: Family) -> np.ndarray:
  """Returns 8 starts [S, P] from all over: small and large exponents, low and high floors."""
  losses_X = column(runs, "loss")
  starts = []
  for alpha, beta, floor in itertools.product((0.15, 0.6), (0.15, 0.6), (0.3, 0.9)):
    k = 0.3
    log_half = math.log((float(np.median(losses_X)) - floor * losses_X.min()) / 2)
    if family in ("kaplan", "coupled"):
      log_half = log_half / k
    point = {"ln E": math.log(floor * losses_X.min()), "alpha": alpha, "beta": beta, "k": k}
    point |= {"ln A": log_half, "ln B": log_half}
    starts.append([point[name] for name in NUMBERS[family]])
  return np.array(starts)


def _all_numbers(family: Family, numbers_P: Any) -> dict[str, Any]:
  """Returns all six numbers of the coupled form by name; a family fixes some of them."""
  numbers = {name: numbers_P[i] for i, name in enumerate(NUMBERS[family])}
  fixed: dict[str, Any] = {"ln E": -math.inf, "beta": 1.0, "k": 1.0}
  if family == "tied":
    fixed["beta"] = numbers["alpha"]
  return {**fixed, **numbers}


def _residual(family: Family) -> Any:
  """Returns residual(numbers_P, data): ln of the law's loss minus ln of the measured one, [X]."""

  def residual(numbers_P: jax.Array, data: Data) -> jax.Array:
    n = _all_numbers(family, jnp.where(jnp.isnan(data.fixed_P), numbers_P, data.fixed_P))
    log_sum_X = jnp.logaddexp(
      n["ln A"] - n["alpha"] * data.log_N_X, n["ln B"] - n["beta"] * data.log_D_X
    )
    log_rest_X = n["k"] * log_sum_X
    predicted_X = log_rest_X if family == "kaplan" else jnp.logaddexp(n["ln E"], log_rest_X)
    return predicted_X - data.log_loss_X

  return residual


RESIDUALS = {family: _residual(family) for family in NUMBERS}
"""One function per family, so that each is compiled once."""


def law_of(family: Family, numbers_P: np.ndarray, runs: Sequence[Run], counts: Counts) -> SumLaw:
  """Returns the law in N and D themselves: centring moves ln A by alpha times the mean of ln N."""
  n = {name: float(value) for name, value in _all_numbers(family, numbers_P).items()}
  mean_N = float(np.mean(np.log([run.parameters(counts) for run in runs])))
  mean_D = float(np.mean(np.log(column(runs, "tokens"))))
  return SumLaw(
    E=math.exp(n["ln E"]),
    A=math.exp(n["ln A"] + n["alpha"] * mean_N),
    B=math.exp(n["ln B"] + n["beta"] * mean_D),
    alpha=n["alpha"],
    beta=n["beta"],
    k=n["k"],
    counts=counts,
    source=f"fit of {len(runs)} runs",
  )


def _warnings(runs: Sequence[Run], counts: Counts) -> list[str]:
  """Returns what the table cannot say, before any number is read from it."""
  costs_X = np.array([run.six_n_d(counts) for run in runs])
  decades = float(np.log10(costs_X.max() / costs_X.min()))
  warnings = []
  if decades < 1.5:
    warnings.append(f"the runs span {decades:.1f} decades of compute: below 1.5, E says nothing")
  exact = [run.flops for run in runs if run.flops is not None]
  if len(exact) == len(runs):
    apart = float(np.max(np.abs(np.log(np.array(exact) / costs_X))))
    if apart > 0.1:
      warnings.append(
        f"exact FLOPs and 6 N D differ by up to {math.expm1(apart):.0%}: say which one C is"
      )
  return warnings
