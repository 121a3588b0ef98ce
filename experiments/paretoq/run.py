"""Weights of 1 to 4 bits, trained after full precision (arXiv:2502.02631)."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import finetuned
from experiments.finetuned import Setup
from experiments.small_text import signed
from experiments.study import Finding, Scale, Study, Verdict, main, measure_points
from jaxlm.config import QuantRule, QuantSpec, check
from jaxlm.config.formats import Format, LsqFormat, UniformFormat
from jaxlm.recipes import Rules, load_rules
from jaxlm.scaling.intervals import Interval, interval
from jaxlm.scaling.sweep import Executor, Row


class Plan(NamedTuple):
  """Holds what is trained at one scale."""

  D: int
  layers: int
  steps: int
  splits: tuple[int, ...]
  """per cent of the steps in full precision"""
  seeds: int


PLANS: dict[Scale, Plan] = {
  "smoke": Plan(16, 1, 50, (0, 80, 100), 2),
  "cpu": Plan(32, 2, 1500, (0, 50, 80, 90, 100), 3),
  "gpu": Plan(128, 8, 1200, (0, 50, 80, 90, 100), 3),
}
BITS = ("1", "ternary", "2", "3", "4")
SPLIT_BITS = ("1", "2", "4")
"""which are trained at every split"""
COMPARED = 80
"""per cent in full precision where functions and changes of weights are compared"""
OWN, FULL = "ParetoQ", "full precision"
ONE_FOR_ALL = {
  "LSQ": ("2", "3", "4"),
  "LSQ without a level at 0": ("1", "2", "3", "4"),
  "min-max": ("1", "2", "3", "4"),
}
"""one function for all widths, and the widths that it has"""


def rules_of(method: str, bits: str) -> Rules:
  """Returns the rule for the weights of all layers."""
  if method == FULL:
    return ()
  if method == OWN:
    return load_rules(f"paretoq:{bits}")
  weight: Format
  if method == "min-max":
    weight = UniformFormat(bits=int(bits), grid="midrise" if bits == "1" else "symmetric")
  else:
    grid = {"LSQ": "symmetric", "LSQ without a level at 0": "midrise"}[method]
    weight = LsqFormat(bits=int(bits), grid=grid, shared="row")  # type: ignore[arg-type]
  return (QuantRule(match="layers.*", spec=QuantSpec(weight=weight)),)


def measure_run(scale: Scale, method: str, bits: str, full: int, **setup: int) -> dict[str, Any]:
  """Trains `full` per cent of the steps in full precision, then the others by the method.

  "before" is the loss where the method begins, l1 and l2 the change of the weights from there.
  """
  run, rules = Setup(**setup), rules_of(method, bits)
  first = round(run.steps * full / 100)
  rest = run.steps - first
  if not first:
    config = finetuned.from_scratch(scale, run, run.steps)
    params = finetuned.train(config, rules)
    return _row(finetuned.heldout_loss(config, params, rules))
  config = finetuned.from_trained(scale, run, max(rest, 1))
  start = finetuned.full_precision(scale, run, first)
  before = finetuned.heldout_loss(config, start, rules)
  if not rest:
    return _row(before)
  params = finetuned.train(config, rules, start, first_step=first)
  l1, l2 = finetuned.relative_change(start, params)
  return _row(finetuned.heldout_loss(config, params, rules), before=before, l1=l1, l2=l2)


def _row(loss: float, **others: float) -> dict[str, Any]:
  status = {} if math.isfinite(loss) else {"status": "diverged"}
  return {"heldout_loss": loss} | others | status


def measure(scale: Scale, table: Path, executor: Executor | None) -> None:
  """Trains every width at every split, and all functions at one of them."""
  plan = PLANS[scale]
  runs = [(FULL, "16", COMPARED), (FULL, "16", 100)]
  runs += [(OWN, bits, COMPARED) for bits in BITS]
  runs += [(name, bits, COMPARED) for name, widths in ONE_FOR_ALL.items() for bits in widths]
  runs += [(OWN, b, split) for split in plan.splits if split != COMPARED for b in SPLIT_BITS]
  points = [
    {"task.method": method, "task.bits": bits, "task.full": split}
    | Setup(plan.D, plan.layers, plan.steps, seed).columns()
    for seed in range(plan.seeds)
    for method, bits, split in runs
  ]
  measure_points(points, table, functools.partial(measure_run, scale))


def by_seed(
  rows: list[Row], method: str, bits: str, full: int = COMPARED, column: str = "heldout_loss"
) -> np.ndarray:
  """Returns a column of the runs of a method at a width and a split, one value per seed."""
  values = {
    row["task.seed"]: row[column]
    for row in rows
    if (row["task.method"], str(row["task.bits"]), row["task.full"]) == (method, bits, full)
  }
  return np.array([values[seed] for seed in sorted(values)], float)


def conclude(rows: list[Row]) -> Finding:
  seeds = {row["task.seed"] for row in rows}
  check(len(seeds) > 1, "seeds", len(seeds), "two are needed for an interval")
  loss = {bits: by_seed(rows, OWN, bits) for bits in BITS}
  complete = all(len(values) == len(seeds) for values in loss.values())
  check(complete, "runs", len(rows), "each width is needed for each seed")
  order = [interval(loss[a] - loss[b]) for a, b in zip(BITS, BITS[1:])]
  drift = by_seed(rows, FULL, "16", column="l1")
  ratio = {bits: interval(by_seed(rows, OWN, bits, column="l1") / drift) for bits in BITS}
  gain = {
    (name, bits): interval(by_seed(rows, name, bits) - loss[bits])
    for name, widths in ONE_FOR_ALL.items()
    for bits in widths
  }
  curves = {bits: split_curve(rows, bits) for bits in SPLIT_BITS}
  best = {bits: min(curve, key=lambda full: curve[full].mean()) for bits, curve in curves.items()}
  verdict, why = judge(order, ratio, gain, curves, best)
  lines = [
    f"{bits}: {_changes(rows, OWN, bits)}, {mean:.2f} times the drift ({low:.2f} to {high:.2f})"
    for bits, (mean, low, high) in ratio.items()
  ]
  lines.append(f"full precision, trained on likewise: {_changes(rows, FULL, '16')}")
  lines += [
    f"{name} in place of its own function at {bits} bits: {signed(value)} nats"
    for (name, bits), value in gain.items()
  ]
  lines += [
    f"{bits} bits after so many per cent in full precision: "
    + ", ".join(f"{full} % {values.mean():.3f}" for full, values in curve.items())
    for bits, curve in curves.items()
  ]
  drop = interval(by_seed(rows, OWN, "2", column="l1") - by_seed(rows, OWN, "3", column="l1"))
  return Finding(
    ours=", ".join(f"{bits} {loss[bits].mean():.3f}" for bits in BITS) + " nats per byte; the "
    f"weights of 2 bits move {drop[0]:+.3f} (L1) more than those of 3",
    interval=f"{drop[1]:+.3f} to {drop[2]:+.3f}, 95 % over {len(seeds)} paired seeds",
    verdict=verdict,
    why=why,
    lines=tuple(lines),
  )


def judge(
  order: list[Interval],
  ratio: dict[str, Interval],
  gain: dict[tuple[str, str], Interval],
  curves: dict[str, dict[int, np.ndarray]],
  best: dict[str, int],
) -> tuple[Verdict, str]:
  """Returns the verdict and its reason, by the rules that `STUDY` states."""
  ordered = all(low > 0 for _, low, _ in order)
  moved = all(ratio[b][1] > 1.5 for b in ("ternary", "2"))
  moved &= all(ratio[b][2] < 1.3 for b in ("3", "4"))
  own = all(low > (0 if bits in ("1", "2") else -0.01) for (_, bits), (_, low, _) in gain.items())
  late = all(full in (80, 90) for full in best.values())
  holds = {
    "each bit more lowers the loss": ordered,
    "weights move away at 2 bits and stay at 3": moved,
    "its own function is best at each width": own,
    "80 or 90 % in full precision are best": late,
  }
  if all(holds.values()):
    return "reproduced", "All four claims hold."
  finer = min(ratio["3"][0], ratio["4"][0])
  coarser = max(ratio["ternary"][0], ratio["2"][0])
  against = {
    "the weights of 2 bits move less than those of 3 or 4": coarser < finer,
    "one function for all widths is better at 2 bits": any(
      high < 0 for (_, bits), (_, _, high) in gain.items() if bits == "2"
    ),
    "training in few bits from the start is best": all(full == 0 for full in best.values()),
  }
  if any(against.values()):
    return "refuted", _sentence([name for name, is_so in against.items() if is_so])
  missing = _sentence([name for name, is_so in holds.items() if not is_so])
  mixed = all(0 < full < 100 for full in best.values())
  if mixed and coarser > finer and all(mean > 0 for mean, _, _ in order):
    return "direction only", f"Not shown: {missing}"
  return "undecided", f"Not shown: {missing}"


def _sentence(parts: list[str]) -> str:
  return "; ".join(parts) + "."


def split_curve(rows: list[Row], bits: str) -> dict[int, np.ndarray]:
  """Returns per cent in full precision -> losses of all seeds."""
  splits = sorted({row["task.full"] for row in rows})
  losses = {full: by_seed(rows, OWN, bits, full) for full in splits}
  return {full: values for full, values in losses.items() if len(values)}


def _changes(rows: list[Row], method: str, bits: str) -> str:
  before, after, l1, l2 = (
    by_seed(rows, method, bits, column=column).mean()
    for column in ("before", "heldout_loss", "l1", "l2")
  )
  text = f"loss {before:.3f} before, {after:.3f} after; "
  return f"{text}weights change by {l1:.3f} (L1), {l2:.3f} (L2)"


def draw(rows: list[Row], figure: Any) -> None:
  splits, functions, changes = figure.subplots(1, 3)
  for bits in SPLIT_BITS:
    curve = split_curve(rows, bits)
    splits.plot(list(curve), [values.mean() for values in curve.values()], ".-", label=bits)
  plain = by_seed(rows, FULL, "16", 100).mean()
  splits.axhline(plain, color="gray", linestyle=":", label="16")
  splits.set(xlabel="% in full precision, then few bits", ylabel="held-out loss, nats per byte")
  splits.set_ylim(plain - 0.05, plain + 0.6)  # weights that are only rounded may lie far above
  splits.legend(title="bits", frameon=False)
  places = {bits: place for place, bits in enumerate(BITS)}
  for name, widths in ({OWN: BITS} | ONE_FOR_ALL).items():
    losses = [by_seed(rows, name, bits).mean() for bits in widths]
    functions.plot([places[bits] for bits in widths], losses, ".-", label=name)
  functions.set_xticks(range(len(BITS)), BITS)
  functions.set(xlabel="bits", ylabel="held-out loss, nats per byte")
  functions.legend(frameon=False, fontsize=7)
  for column, mark in (("l1", "o"), ("l2", "x")):
    for bits in BITS:
      values = by_seed(rows, OWN, bits, column=column)
      changes.plot([places[bits]] * len(values), values, f"k{mark}", markersize=4)
  drift = by_seed(rows, FULL, "16", column="l1").mean()
  changes.axhline(drift, color="gray", linestyle=":")
  changes.set_xticks(range(len(BITS)), BITS)
  changes.set(xlabel="bits", ylabel="change of the weights: o L1, x L2")
  changes.text(0, drift, "full precision, L1", color="gray", fontsize=7, va="top")
  changes.set_ylim(bottom=0)


STUDY = Study(
  name="paretoq",
  title="Weights of one to four bits, trained after full precision",
  source="arXiv:2502.02631",
  claim="Each width needs a function of its own; full precision for most of the training and few "
  "bits for the rest is better than either alone; between 3 and 2 bits training stops "
  "compensating for rounding and starts to find other weights.",
  published="About 90 % of the tokens in full precision are near the best at every width "
  "(MobileLLM-125M); the relative change of the weights is 10 to 20 % from 3 bits on and about "
  "40 % at 2 bits and below (as reported by others; which norm is not stated). Wiki2 perplexity "
  "at 125M: 25.8, 20, 18.2, 15, 14.1 for 1, 1.58, 2, 3, 4 bits, 15.1 for bf16.",
  setting=f"{finetuned.SETTING} D 32, two layers, 2.0e4 parameters in them, 1,500 steps in both "
  "phases together, 75 bytes for each of these parameters (on a GPU D 128, 8 layers). Functions "
  "and the change of weights are compared after 80 % in full precision, at one rate, beside "
  "full precision that trains on at that rate. At 0 % the run starts from drawn weights, at 100 % "
  "weights are rounded without training. One for all: LSQ with steps per row and a level at 0 (2 "
  "to 4 bits) or without (1 to 4), and scales of the largest weight, straight through. Three seeds "
  "for weights and order; intervals are Student's t over differences paired by seed.",
  refuted_by="Reproduced: (a) each bit more lowers the loss; (b) the L1 change over that of full "
  "precision is above 1.5 for ternary and 2 bits and below 1.3 for 3 and 4; (c) no function for "
  "all widths is as good at 1 and 2 bits, nor 0.01 better at 3 and 4: all by 95 % intervals; (d) "
  "80 or 90 % has the lowest mean at 1, 2 and 4 bits. Refuted: weights of ternary and 2 bits move "
  "less on average than those of 3 and 4, or one function is better at 2 bits by its interval, or "
  "0 % is best at all widths. Direction only: otherwise, if means fall with bits, weights move "
  "more below 3 bits, and the best split lies between the ends. Undecided: else.",
  cannot_show="How much the rate decides: each phase has one, and a longer phase in few bits may "
  "want a higher one. The change of weights grows with rate and steps, so that only its ratio to "
  "the drift is compared. No zero-shot tasks: these models have none to be good at.",
  measure=measure,
  conclude=conclude,
  draw=draw,
)

if __name__ == "__main__":
  main(STUDY)
