"""Intervals of fitted laws: the table is drawn again with replacement, and each draw fitted."""

# X runs, P fitted numbers, S starts, R resamples, U units that are drawn

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.config import check
from jaxlm.scaling.fit import RESIDUALS, Fit, law_of, shared_data, starting_points
from jaxlm.scaling.laws import Counts, SumLaw
from jaxlm.scaling.runs import Run
from jaxlm.scaling.solver import minimize
from pallas_kernels.common.checks import check_choice


class Resamples(NamedTuple):
  """Holds the laws of resampled tables, to take intervals of anything that a law says."""

  laws: tuple[SumLaw, ...]
  by: str

  def interval(self, value: Callable[[SumLaw], float], level: float = 0.95) -> tuple[float, float]:
    """Returns the percentile interval of value(law), such as `lambda law: law.exponent`."""
    values = np.array([value(law) for law in self.laws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
  fit: Fit, samples: int = 1000, *, by: Literal["run", "group"] = "run", seed: int = 0
) -> Resamples:
  """Returns the laws of `samples` tables drawn with replacement, each fitted again.

  By "group", runs of one group (of one size, unless they name theirs) are drawn together: they
  share a configuration, so that drawing single runs promises too much. Every resample starts from
  the fit and from two distant points; the best of the three ends counts. Percentile intervals of
  squared errors (a delta above the noise) hold the true exponent as often as they say; those of
  nearly absolute errors more often: 90 % ones in 96 % of 200 simulated tables of 50 runs.
  """
  check(samples > 0, "samples", samples, "must be positive")
  members_UX = members(fit.runs, fit.law.counts, by)
  units = len(members_UX)
  rng = np.random.default_rng(seed)
  draws_RU = rng.multinomial(units, np.full(units, 1 / units), size=samples)
  weights_RX = draws_RU @ members_UX
  distant_SP = starting_points(fit.runs, fit.family)[[0, -1]]
  starts_SP = np.concatenate([fit.numbers_P[None], distant_SP])
  ends = minimize(
    RESIDUALS[fit.family],
    np.repeat(starts_SP, samples, axis=0),
    shared_data(fit.runs, fit.law.counts, fit.family),
    np.tile(weights_RX, (len(starts_SP), 1)),
    delta=fit.delta,
  )
  best_R = ends.objective.reshape(-1, samples).argmin(axis=0)
  numbers_RP = ends.numbers_P.reshape(len(starts_SP), samples, -1)[best_R, np.arange(samples)]
  laws = tuple(law_of(fit.family, numbers_P, fit.runs, fit.law.counts) for numbers_P in numbers_RP)
  return Resamples(laws, by)


def members(runs: Sequence[Run], counts: Counts, by: Literal["run", "group"]) -> np.ndarray:
  """Returns which runs belong to which unit that is drawn, 0 or 1 of [U, X].

  Raises UserError where all are of one group.
  """
  check_choice("by", by, ("run", "group"))
  groups = [str(x) for x in range(len(runs))]
  if by == "group":
    groups = [run.group or f"{run.parameters(counts):.6g}" for run in runs]
  units = dict.fromkeys(groups)
  check(len(units) > 1, "by", by, "the table has one group only")
  return np.array([[float(group == unit) for group in groups] for unit in units])
