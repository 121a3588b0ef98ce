"""Says in words what a fit has identified."""

# N parameters, D training tokens, C training FLOPs

from __future__ import annotations

import operator
from collections.abc import Callable

from jaxlm.scaling.bootstrap import Resamples
from jaxlm.scaling.fit import Fit, leave_future_out, profile
from jaxlm.scaling.isoflop import IsoflopFit
from jaxlm.scaling.laws import SumLaw
from jaxlm.scaling.runs import column


def verdicts(fit: Fit, resamples: Resamples) -> list[str]:
  """Returns one sentence for each thing that the table does or does not say."""
  sentences = list(fit.warnings)
  least = float(column(fit.runs, "loss").min())
  if fit.family != "kaplan":
    low, high = resamples.interval(lambda law: law.E)
    without = float(profile(fit, "E", [0.01 * least])[0]) / fit.objective - 1
    if low < 0.2 * least or without < 0.03:
      sentences.append(
        f"irreducible loss not identified: E is {low:.3f} to {high:.3f}, and with one of "
        f"{0.01 * least:.3f} the objective changes by {without:+.1%}"
      )
  for name in ("A", "B"):
    low, high = resamples.interval(operator.attrgetter(name))
    if high > 3 * low:
      sentences.append(f"{name} not identified apart from its exponent: {low:.4g} to {high:.4g}")
  low, high = resamples.interval(lambda law: law.exponent)
  if high - low > 0.1:
    sentences.append(f"exponent a known to within {low:.3f} to {high:.3f} only")
  if fit.starts_agreeing < 0.5:
    sentences.append(
      f"only {fit.starts_agreeing:.0%} of the starts end at this optimum: others may be as good"
    )
  return sentences


def summary(fit: Fit, by_run: Resamples, by_group: Resamples, budget: float | None) -> list[str]:
  """Returns the lines that describe a fit: estimator, numbers with intervals, forecast, verdict."""
  law = fit.law
  lines = [
    f"{fit.family} law of {len(fit.runs)} runs, N counts {law.counts}; Huber delta {fit.delta:g} "
    f"in ln loss, {len(fit.dropped)} largest losses dropped",
    f"objective {fit.objective:.6g}, residuals {fit.root_mean_square:.2%}, "
    f"{fit.starts_agreeing:.0%} of the starts agree",
    f"{'':<14}{'value':>14}   95 % by run{'':<16}95 % by group",
  ]
  for name, value in _reported(law, budget).items():
    low, high = by_run.interval(value)
    low_group, high_group = by_group.interval(value)
    lines.append(
      f"{name:<14}{value(law):>14.6g}   {f'{low:.5g} to {high:.5g}':<27}"
      f"{low_group:.5g} to {high_group:.5g}"
    )
  forecast = leave_future_out(fit)
  lines.append(
    f"fitted to the {forecast.fitted} cheapest runs, it predicts the other {forecast.predicted} "
    f"to {forecast.root_mean_square:.2%} (bias {forecast.bias:+.2%})"
  )
  return lines + [f"- {sentence}" for sentence in verdicts(fit, by_run)]


def _reported(law: SumLaw, budget: float | None) -> dict[str, Callable[[SumLaw], float]]:
  """Returns what is printed of a law: its numbers, the exponent a, and what a budget should buy."""
  names = ["E", "A", "B", "alpha", "beta", *(["k"] if law.k != 1 else [])]
  values: dict[str, Callable[[SumLaw], float]] = {n: operator.attrgetter(n) for n in names}
  values["a"] = lambda law: law.exponent
  if budget is not None:
    values[f"N at {budget:.3g}"] = lambda law: law.allocate(budget).N
    values["D / N there"] = lambda law: law.allocate(budget).D / law.allocate(budget).N
    values["loss there"] = lambda law: law.allocate(budget).loss
  return values


def isoflop_summary(fit: IsoflopFit, budget: float | None) -> list[str]:
  """Returns the lines that describe an IsoFLOP fit: each budget with its verdict, then the line."""
  lines = [f"{'FLOPs':>10}{'N_opt':>12}{'D / N':>9}{'loss':>9}  runs  verdict"]
  for v in fit.vertices:
    lines.append(
      f"{v.budget:>10.3g}{v.N:>12.4g}{v.D / v.N:>9.3g}{v.loss:>9.4f}{v.runs:>6}  {v.verdict}"
    )
  low, high = fit.interval
  lines.append(
    f"N_opt = {fit.coefficient:.5g} C^{fit.exponent:.4f}, exponent {low:.3f} to {high:.3f} by runs "
    f"within budgets; N counts {fit.counts}, window {fit.window:g} in ln N"
  )
  if budget is not None:
    lines.append(f"at {budget:.3g} FLOPs: N_opt {fit.parameters_at(budget):.4g}")
  return lines + [f"- {warning}" for warning in fit.warnings]
