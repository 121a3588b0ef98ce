"""Draws fits: losses with the law's curves, residuals, and the best size of each budget."""

# N parameters, D training tokens, C training FLOPs, X runs

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.scaling.bootstrap import Resamples
from jaxlm.scaling.fit import Fit, prediction_errors, run_costs
from jaxlm.scaling.isoflop import MINIMUM, IsoflopFit
from jaxlm.scaling.runs import Run, column
from pallas_kernels.common.errors import import_extra


def draw_fit(fit: Fit, resamples: Resamples, path: Path) -> None:
  """Draws losses with the law's curves, residuals, and best N over C with its 95 % band.

  Raises MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing a fit").Figure
  law = fit.law
  N_X = np.array([run.parameters(law.counts) for run in fit.runs])
  D_X, loss_X = column(fit.runs, "tokens"), column(fit.runs, "loss")
  C_X = run_costs(fit.runs, law.counts)
  figure = new_figure(figsize=(13, 4.2), layout="constrained")
  losses, residuals, best = figure.subplots(1, 3)

  points = losses.scatter(D_X, loss_X, c=np.log10(N_X), s=14, cmap="viridis", zorder=3)
  grid = np.geomspace(D_X.min(), D_X.max(), 100)
  for N in np.geomspace(N_X.min(), N_X.max(), 5):
    losses.plot(grid, law.loss(N, grid), color=points.to_rgba(np.log10(N)), linewidth=1)
  losses.set(xscale="log", xlabel="training tokens D", ylabel="loss, nats per token")
  figure.colorbar(points, ax=losses, label=f"log10 N ({law.counts})")

  residuals.axhline(0, color="gray", linewidth=1)
  residuals.scatter(C_X, -100 * prediction_errors(law, fit.runs), s=14)
  residuals.set(xscale="log", xlabel="training FLOPs C", ylabel="measured over predicted loss, %")

  budgets = np.geomspace(C_X.min(), 10 * C_X.max(), 60)
  drawn = [[sample.allocate(C).N for C in budgets] for sample in resamples.laws[:300]]
  low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
  best.fill_between(budgets, low, high, alpha=0.25, label=f"95 % by {resamples.by}")
  best.plot(budgets, [law.allocate(C).N for C in budgets], label=f"a = {law.exponent:.3f}")
  best.scatter(C_X, N_X, s=8, color="gray", label="runs")
  best.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="compute-optimal N")
  best.legend(frameon=False)
  figure.savefig(path, dpi=130)


def draw_isoflop(fit: IsoflopFit, runs: Sequence[Run], path: Path) -> None:
  """Draws losses over N by budget with their vertices, and N_opt over C with the fitted line.

  Raises MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing a fit").Figure
  N_X = np.array([run.parameters(fit.counts) for run in runs])
  C_X, loss_X = run_costs(runs, fit.counts), column(runs, "loss")
  good = [vertex for vertex in fit.vertices if vertex.verdict == MINIMUM]
  figure = new_figure(figsize=(10, 4.2), layout="constrained")
  valleys, line = figure.subplots(1, 2)
  for vertex in fit.vertices:
    members = np.flatnonzero(np.abs(C_X / vertex.budget - 1) < 0.02)
    members = members[np.argsort(N_X[members])]
    valleys.plot(N_X[members], loss_X[members], ".-", linewidth=0.8, label=f"{vertex.budget:.3g}")
  valleys.plot([v.N for v in good], [v.loss for v in good], "k*", label="vertex")
  valleys.set(xscale="log", xlabel=f"parameters N ({fit.counts})", ylabel="loss, nats per token")
  valleys.legend(title="FLOPs", fontsize=7, frameon=False)
  budgets = np.geomspace(min(v.budget for v in fit.vertices), fit.vertices[-1].budget, 50)
  best_N = np.array([v.N for v in good])
  spread = np.array([v.deviation for v in good])
  below, above = -best_N * np.expm1(-spread), best_N * np.expm1(spread)
  line.errorbar([v.budget for v in good], best_N, [below, above], fmt="k*", capsize=2)
  line.plot(budgets, [fit.parameters_at(C) for C in budgets], label=f"a = {fit.exponent:.3f}")
  line.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="compute-optimal N")
  line.legend(frameon=False)
  figure.savefig(path, dpi=130)
