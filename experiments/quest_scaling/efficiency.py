"""What a table of runs in few bits says of eff: the law, its intervals, and the paper's table."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.small_quantized import FULL
from experiments.small_text import runs_of
from jaxlm.config import check
from jaxlm.scaling.precision import (
  PANFEROV,
  EfficiencyFit,
  EfficiencyLaw,
  bootstrap_efficiency,
  fit_efficiency,
)
from jaxlm.scaling.published import quest
from jaxlm.scaling.sweep import Row

BITS = {"W1A1": 1, "W2A2": 2, "W3A3": 3, "W4A4": 4, "W8A8": 8}
LONG = 15.0
"""tokens per parameter from which a run counts for the law"""
SAMPLES = 1000
_N_30M, _LOSS_30M = 30_482_560, 3.2071
"""of the published 16-bit run to which its table 1 compares STE"""
PUBLISHED = {
  **{f"QuEST {p}": PANFEROV.efficiency[str(bits)] for p, bits in BITS.items()},
  "QuEST FP4": PANFEROV.efficiency["FP4"],
  "QuEST, no Hadamard W2A2": PANFEROV.efficiency["2NOH"],
  "QuEST, no Hadamard W4A4": PANFEROV.efficiency["4NOH"],
  "LSQ W2A2": 0.12,
  "LSQ W4A4": 0.56,
  "STE W2A2": PANFEROV.efficiency_of(_N_30M, 4.793 - _LOSS_30M),
  "STE W4A4": PANFEROV.efficiency_of(_N_30M, 3.792 - _LOSS_30M),
}
"""eff of arXiv:2502.05003, table 2 and notebook; of STE from its losses at 30M (table 1)"""


def label(row: Row) -> str:
  """Returns method and precision, such as "QuEST W4A4", or "16"."""
  return f"{row['task.method']} {row['task.precision']}" if row["task.method"] else FULL


def fit(rows: list[Row]) -> tuple[EfficiencyFit, list[EfficiencyLaw]]:
  """Returns the law of the long runs, by squared errors as the paper's, and resampled laws.

  Runs of one size, duration and seed are drawn together: they start alike and read the same text.
  """
  rows = [row for row in rows if row["tokens"] >= LONG * row["body"]]
  sizes = {row["body"] for row in rows}
  check(len(sizes) >= 4, "sizes", len(sizes), "the law needs four")
  missing = {FULL, *PUBLISHED} - {label(row) for row in rows}
  check(not missing, "cells", ", ".join(sorted(missing)), "are needed")
  runs = [
    dataclasses.replace(run, precision=label(row), group=f"{run.body} {run.tokens} {run.seed}")
    for run, row in zip(runs_of(rows), rows)
  ]
  fitted = fit_efficiency(runs, delta=1.0)
  return fitted, bootstrap_efficiency(fitted, SAMPLES, by="group")


@functools.cache
def refit() -> EfficiencyFit:
  """Returns the law of the published runs, fitted again."""
  return fit_efficiency(quest(), delta=1.0)


def refit_line() -> str:
  """Returns how far the published table, fitted again, is from the published eff."""
  ours = refit()
  off = {name: ours.law.efficiency[name] - value for name, value in PANFEROV.efficiency.items()}
  worst = max(off, key=lambda name: abs(off[name]))
  within = "within 0.01" if abs(off[worst]) <= 0.01 else "NOT within 0.01"
  return (
    f"the published table ({len(ours.runs)} runs, {len(off)} formats) fitted again: eff {within} "
    f"of the printed values, farthest {worst} ({ours.law.efficiency[worst]:.4f}, printed "
    f"{PANFEROV.efficiency[worst]:.4f}); alpha {ours.law.base.alpha:.4f} (printed "
    f"{PANFEROV.base.alpha:.4f})"
  )


def best_bits(laws: list[EfficiencyLaw]) -> dict[int, float]:
  """Returns bits -> share of the laws in which eff per bit is largest there."""
  names = {16: FULL} | {bits: f"QuEST {p}" for p, bits in BITS.items()}
  best = [max(names, key=lambda bits: law.efficiency[names[bits]] / bits) for law in laws]
  return {bits: best.count(bits) / len(best) for bits in sorted(names)}


def interval_of(laws: list[EfficiencyLaw], over: str, under: str = FULL) -> tuple[float, float]:
  """Returns the 95 % interval of the ratio of two formats' eff."""
  ratios = [law.efficiency[over] / law.efficiency[under] for law in laws]
  low, high = np.quantile(ratios, [0.025, 0.975])
  return float(low), float(high)


def excess(rows: list[Row], over: str, under: str = FULL) -> dict[tuple[int, float], list[float]]:
  """Returns (N, tokens per N) -> loss of one label above the other's, for each seed of both.

  Tokens per N have two digits: steps are whole numbers.
  """
  losses: dict[str, dict[tuple[int, int, int], float]] = {over: {}, under: {}}
  for row in rows:
    if label(row) in losses:
      losses[label(row)][row["body"], row["tokens"], row["seed"]] = row["heldout_loss"]
  differences: dict[tuple[int, float], list[float]] = {}
  for N, tokens, seed in sorted(losses[over].keys() & losses[under].keys()):
    run = (N, tokens, seed)
    cell = differences.setdefault((N, float(f"{tokens / N:.2g}")), [])
    cell.append(losses[over][run] - losses[under][run])
  return differences


def gaps(rows: list[Row], name: str) -> dict[float, float]:
  """Returns tokens per parameter -> loss above that of 16 bits, mean of seeds, largest size."""
  cells = excess(rows, name)
  largest = max(N for N, _ in cells)
  return {ratio: float(np.mean(values)) for (N, ratio), values in cells.items() if N == largest}
