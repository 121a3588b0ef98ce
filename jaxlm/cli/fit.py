"""Defines `jaxlm fit`: a scaling law of anybody's table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from jaxlm.config import check


def fit(
  table: tyro.conf.Positional[Path],
  law: Literal["chinchilla", "tied", "kaplan", "coupled", "isoflop", "all"] = "chinchilla",
  counts: Literal["body", "body+head", "total", "effective"] = "total",
  loss: str = "loss",
  tokens: str = "tokens",
  parameters: str = "parameters",
  flops: str | None = None,
  group: str | None = None,
  delta: float = 1e-3,
  drop_largest: int = 0,
  window: float = 1.0,
  samples: int = 1000,
  budget: float | None = None,
  out: Path | None = None,
) -> int:
  """Fit a scaling law to a CSV table with one row per run: numbers, intervals, forecast, verdict.

  Args:
    table: CSV file; the table of a sweep, or any other
    law: chinchilla is E + A/N^alpha + B/D^beta; tied has alpha = beta; kaplan no E; coupled
      E + (A/N^alpha + B/D^beta)^k; isoflop fits a parabola per budget; all lists the exponent of
      N_opt by approaches 1, 2 and 3 and the joint forms, without a picture
    counts: what the parameters count: layers (body), layers and output matrix, everything, or
      FLOPs per token / 6 (effective, from the column of flops)
    loss: column of the losses, in nats per token
    tokens: column of the training tokens
    parameters: column of the parameters
    flops: column of the training FLOPs; otherwise 6 N D
    group: column that names runs which are resampled together; otherwise equal sizes
    delta: Huber threshold in ln loss, part of the estimator
    drop_largest: how many of the largest losses to leave out; decide before looking
    window: of isoflop: runs within so much of ln N around the least loss
    samples: resamples for the intervals
    budget: training FLOPs to forecast the best size and loss for
    out: picture to write (extra plot)
  """
  from jaxlm.scaling import approaches, figures, verdict
  from jaxlm.scaling.bootstrap import bootstrap
  from jaxlm.scaling.fit import fit_law
  from jaxlm.scaling.isoflop import fit_isoflop
  from jaxlm.scaling.runs import read_runs

  columns = {"loss": loss, "tokens": tokens}
  if counts != "effective":
    columns["total" if counts == "total" else "body"] = parameters
  columns |= {name: given for name, given in (("flops", flops), ("group", group)) if given}
  head = {"head": 0.0} if counts == "body+head" else {}
  runs = read_runs(table, columns, **head)
  if law == "all":
    check(out is None, "out", out, "--law all draws no picture")
    found = approaches.compare(runs, counts=counts, window=window, delta=delta, samples=samples)
    print("\n".join(approaches.summary(found)))
    return 0
  if law == "isoflop":
    line = fit_isoflop(runs, counts=counts, window=window, samples=samples)
    print("\n".join(verdict.isoflop_summary(line, budget)))
    if out is not None:
      figures.draw_isoflop(line, runs, out)
  else:
    fitted = fit_law(runs, law, counts=counts, delta=delta, drop_largest=drop_largest)
    by_run, by_group = bootstrap(fitted, samples), bootstrap(fitted, samples, by="group")
    print("\n".join(verdict.summary(fitted, by_run, by_group, budget)))
    if out is not None:
      figures.draw_fit(fitted, by_group, out)
  if out is not None:
    print(f"drew {out}")
  return 0
