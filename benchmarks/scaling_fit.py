"""Seconds to fit a law with intervals: all starts and resamples at once, against L-BFGS in turn.

    python -m benchmarks.scaling_fit --write benchmarks/results/scaling_fit_cpu2.md

240 runs on the surface of arXiv:2404.10102 with noise that has heavy tails. One arm is
`jaxlm.scaling.fit` (8 starts) with 1,000 resamples; the other scipy's L-BFGS-B, one start after
another, from the usual grid of 4,500 starts (alpha and beta 0 to 2, ln A and ln B 0 to 25, ln E -1
to 1) on the same table, of which `--starts` are run, drawn without replacement, and their mean
counted for the rest.
"""

# N parameters, D training tokens, X runs

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from scipy import optimize, special

from benchmarks.table import publish, report, table
from jaxlm.scaling.bootstrap import bootstrap
from jaxlm.scaling.fit import Fit, fit_law
from jaxlm.scaling.laws import BESIROGLU
from jaxlm.scaling.runs import Run

GRID = list(
  itertools.product(
    np.linspace(-1, 1, 5),
    np.linspace(0, 25, 6),
    np.linspace(0, 2, 5),
    np.linspace(0, 25, 6),
    np.linspace(0, 2, 5),
  )
)


def make_runs(rng: np.random.Generator) -> list[Run]:
  """Returns 240 runs of 6e18 to 6e23 FLOPs around the optimum, residuals of 0.4 % with tails."""
  runs = []
  for C in np.geomspace(6e18, 6e23, 240):
    N = BESIROGLU.allocate(C).N * np.exp(rng.uniform(-1.5, 1.5))
    D = C / 6 / N
    loss = float(BESIROGLU.loss(N, D)) * np.exp(0.004 * rng.standard_t(3))
    runs.append(Run(loss=loss, tokens=D, total=N))
  return runs


def lbfgs_objective(start: tuple[float, ...], runs: list[Run], delta: float) -> float:
  """Returns the sum of Huber losses where L-BFGS-B from this start ends, as papers call it."""
  log_N_X, log_D_X, log_loss_X = np.log([(run.total, run.tokens, run.loss) for run in runs]).T

  def objective(numbers: np.ndarray) -> float:
    e, a, alpha, b, beta = numbers
    terms = np.stack([a - alpha * log_N_X, b - beta * log_D_X, np.full_like(log_N_X, e)])
    return float(special.huber(delta, special.logsumexp(terms, axis=0) - log_loss_X).sum())

  return float(optimize.minimize(objective, start, method="L-BFGS-B").fun)


def fit_with_intervals(runs: list[Run], samples: int) -> tuple[Fit, float, float]:
  """Returns the fit, the seconds of fitting and those of its resamples, compilation included."""
  start = time.perf_counter()
  fit = fit_law(runs)
  fitted = time.perf_counter()
  bootstrap(fit, samples)
  return fit, fitted - start, time.perf_counter() - fitted


def main() -> None:
  """Writes the table to the terminal and to --write."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--starts", type=int, default=150, help="of the 4,500, how many are run")
  parser.add_argument("--samples", type=int, default=1000)
  parser.add_argument("--write", type=Path)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  runs = make_runs(rng)
  fit, fit_seconds, resample_seconds = fit_with_intervals(runs, args.samples)
  chosen = rng.choice(len(GRID), args.starts, replace=False)
  start = time.perf_counter()
  ends = [lbfgs_objective(GRID[i], runs, fit.delta) for i in chosen]
  grid_seconds = (time.perf_counter() - start) / args.starts * len(GRID)
  near = np.mean(np.array(ends) <= 1.001 * fit.objective)
  columns = ("what", "seconds", "objective", "of the starts within 0.1 % of the best")
  lines = [
    ("one fit, 8 starts, compilation included", f"{fit_seconds:.1f}", f"{fit.objective:.8f}",
     f"{fit.starts_agreeing:.0%}"),
    (f"{args.samples:,} resamples, 3 starts each", f"{resample_seconds:.1f}", "", ""),
    (f"one fit by L-BFGS-B from 4,500 starts ({args.starts} run)", f"{grid_seconds:.0f}",
     f"{min(ends):.8f}", f"{near:.0%}"),
  ]  # fmt: skip
  ratio = grid_seconds / fit_seconds
  body = f"{table(columns, lines)}\n\nOne fit is {ratio:.0f} times as fast as the grid of starts."
  publish(report("Fits of scaling laws", body, "jax", "numpy", "scipy"), args.write)


if __name__ == "__main__":
  main()
