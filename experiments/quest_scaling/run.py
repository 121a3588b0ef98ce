"""What share of its parameters a model trained in few bits is worth (QuEST, arXiv:2502.05003)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.quest_scaling.efficiency import (
  BITS,
  LONG,
  PUBLISHED,
  best_bits,
  excess,
  fit,
  gaps,
  interval_of,
  refit_line,
)
from experiments.small_quantized import FULL, make_task, shape
from experiments.small_text import SETTING, base, train
from experiments.study import Finding, Scale, Study, main
from jaxlm.scaling.flops import parameter_count
from jaxlm.scaling.grid import with_fields
from jaxlm.scaling.intervals import interval
from jaxlm.scaling.precision import EfficiencyFit, EfficiencyLaw
from jaxlm.scaling.sweep import Executor, Row

CELLS = {
  "": (FULL,),
  "QuEST": ("W1A1", "W2A2", "W3A3", "W4A4", "W8A8", "FP4"),
  "QuEST, no Hadamard": ("W2A2", "W4A4"),
  "LSQ": ("W2A2", "W4A4"),
  "STE": ("W2A2", "W4A4"),
}
"""precisions by method"""
BASELINES = ("LSQ", "STE", "QuEST, no Hadamard")


class Plan(NamedTuple):
  """Holds what is trained at one scale."""

  sizes: tuple[tuple[int, int], ...]
  """width and layers; the last one is trained short, too"""
  ratios: tuple[float, ...]
  """tokens per parameter of the layers; the first is the short run's"""
  rate: float
  cells: Mapping[str, tuple[str, ...]] = CELLS
  seeds: int = 2


PLANS: dict[Scale, Plan] = {
  "smoke": Plan(
    ((16, 1), (16, 2)), (3, 20), 0.01, {"": (FULL,), "QuEST": ("W4A4",), "STE": ("W2A2",)}, 1
  ),
  "cpu": Plan(((16, 1), (16, 2), (32, 1), (32, 2)), (1.5, 20, 60), 0.01),
  "gpu": Plan(((128, 1), (128, 2), (256, 1), (256, 2)), (1.5, 20, 40), 0.004),
}


def measure(scale: Scale, table: Path, executor: Executor | None) -> None:
  """Trains every size for every ratio in every cell, with the short runs of the largest size.

  Baselines have one seed at the largest ratio.
  """
  plan = PLANS[scale]
  config = base(scale, schedule="cosine", warmup=10)
  if scale == "cpu":  # more steps for the same tokens
    length = 64
    batches = config.eval_batches * config.data.length // length
    data = dataclasses.replace(config.data, length=length)
    config = dataclasses.replace(config, data=data, eval_batches=batches)
  cells = [(method, p) for method, precisions in plan.cells.items() for p in precisions]
  points = []
  for (method, precision), size in itertools.product(cells, plan.sizes):
    model = with_fields(config, shape(*size)).model
    N = parameter_count(model).blocks + model.D
    for ratio in plan.ratios[(size != plan.sizes[-1]) :]:
      steps = round(ratio * N / (config.batch * config.data.length))
      fewer = method in BASELINES and ratio == plan.ratios[-1]
      cell = {"task.method": method, "task.precision": precision, "steps": steps}
      points += [
        shape(*size) | cell | {"optimizer.learning_rate": plan.rate, "seed": seed}
        for seed in range(1 if fewer else plan.seeds)
      ]
  together = scale == "gpu"
  train(config, points, table, make_task=make_task, together=together, executor=executor)


def conclude(rows: list[Row]) -> Finding:
  fitted, laws = fit(rows)
  eff, shares = fitted.law.efficiency, best_bits(laws)
  ratios = {
    method: [interval_of(laws, f"QuEST {p}", f"{method} {p}") for p in CELLS[method]]
    for method in BASELINES
  }
  better = [method for method, both in ratios.items() if all(low > 1 for low, _ in both)]
  worse = [method for method, both in ratios.items() if all(high < 1 for _, high in both)]
  likeliest = max(shares, key=lambda bits: shares[bits])
  if shares[likeliest] >= 0.95 and likeliest != 4 or worse:
    verdict = "refuted"
    why = f"Per bit {likeliest} bits are worth most. " if likeliest != 4 else ""
    why += f"QuEST is worth less than {', '.join(worse)} at 2 and at 4 bits." if worse else ""
  elif shares[4] < 0.95:
    verdict, why = "undecided", f"4 bits are worth most per bit in {shares[4]:.0%} of resamples."
  elif len(better) == len(BASELINES):
    verdict, why = "reproduced", "4 bits are worth most per bit, and QuEST most of the methods."
  else:
    verdict = "direction only"
    names = " and ".join(method for method in BASELINES if method not in better)
    why = f"4 bits are worth most per bit; QuEST against {names} is not decided at 2 and 4 bits."
  low, high = interval_of(laws, "QuEST W4A4")
  return Finding(
    ours=f"eff of QuEST W4A4 {eff['QuEST W4A4']:.3f} (published {PUBLISHED['QuEST W4A4']:.3f})",
    interval=f"{low:.3f} to {high:.3f}, 95 % of {len(laws)} resampled tables",
    verdict=verdict,  # type: ignore[arg-type]
    why=why.strip(),
    lines=(
      refit_line(),
      *_lines_of_law(fitted, laws, shares),
      *_lines_of_losses(rows, ratios),
    ),
  )


def _lines_of_law(
  fitted: EfficiencyFit, laws: list[EfficiencyLaw], shares: dict[int, float]
) -> list[str]:
  """Returns the law's numbers, the eff of each cell beside the published one, and the best bits."""
  law = fitted.law
  base_law, error = law.base, (2 * fitted.objective / len(fitted.runs)) ** 0.5
  lines = [
    f"{len(fitted.runs)} runs: A {base_law.A:.3g}, alpha {base_law.alpha:.3f}, B {base_law.B:.3g}, "
    f"beta {base_law.beta:.3f}, E {base_law.E:.3g}; root mean square error {error:.4f} in ln loss "
    "(published 0.0038)"
  ]
  for name, published in PUBLISHED.items():
    low, high = interval_of(laws, name)
    bits = BITS.get(name.split()[-1], 4)
    lines.append(
      f"{name}: eff {law.efficiency[name]:.3f} ({low:.3f} to {high:.3f}), published "
      f"{published:.3f}; 16 eff / P {16 / bits * law.efficiency[name]:.2f}, published "
      f"{16 / bits * published:.2f}"
    )
  of_bits = ", ".join(f"{bits} bits {share:.1%}" for bits, share in shares.items())
  return [*lines, f"most eff per bit, share of resamples: {of_bits}"]


def _lines_of_losses(rows: list[Row], ratios: dict[str, list[tuple[float, float]]]) -> list[str]:
  """Returns QuEST against each method, and what each cell costs by duration and by size."""
  lines = []
  for method, both in ratios.items():
    for precision, (low, high) in zip(CELLS[method], both):
      cells = excess(rows, f"QuEST {precision}", f"{method} {precision}")
      pairs = [x for (_, ratio), values in cells.items() if ratio >= LONG for x in values]
      mean, least, most = interval(pairs)
      lines.append(
        f"{precision}, QuEST over {method}: eff times {low:.2f} to {high:.2f}; loss {mean:+.4f} "
        f"({least:+.4f} to {most:+.4f}, 95 % over {len(pairs)} pairs of equal runs)"
      )
  for name in PUBLISHED:
    durations = ", ".join(f"{gap:+.3f} at D/N {ratio:g}" for ratio, gap in gaps(rows, name).items())
    cells = excess(rows, name)
    longest = max(ratio for _, ratio in cells)
    sizes = ", ".join(f"{np.mean(x):+.3f}" for (_, r), x in cells.items() if r == longest)
    lines.append(
      f"{name}, nats above 16 bits: largest model {durations}; all sizes at the longest {sizes}"
    )
  return lines


def draw(rows: list[Row], figure: Any) -> None:
  worth, short = figure.subplots(1, 2, width_ratios=[3, 2])
  fitted, laws = fit(rows)
  names = list(PUBLISHED)
  for place, name in enumerate(names):
    worth.plot(interval_of(laws, name), [place, place], "k-", lw=1)
  measured = [fitted.law.efficiency[name] for name in names]
  worth.plot(measured, range(len(names)), "k.", label="measured, 95 %")
  worth.plot(list(PUBLISHED.values()), range(len(names)), "C1o", mfc="none", label="published")
  worth.set(xscale="log", xlabel="eff: share of its parameters that a model is worth")
  worth.set_yticks(range(len(names)), [name.removeprefix("QuEST, ") for name in names])
  worth.invert_yaxis()
  worth.legend(frameon=False, loc="upper left")
  colors, styles = {"W1A1": "C3", "W2A2": "C0", "W4A4": "C2"}, {"LSQ": "--", "STE": ":"}
  for name in PUBLISHED:
    method, precision = name.rsplit(" ", 1)
    if precision in colors and method != "QuEST, no Hadamard":
      gap = gaps(rows, name)
      style = "." + styles.get(method, "-")
      short.plot(list(gap), list(gap.values()), style, color=colors[precision], label=name)
  short.set(xscale="log", xlabel="training bytes per parameter", ylabel="nats above 16 bits")
  short.axhline(0, color="gray", lw=0.5)
  short.set_ylim(top=1.15)
  short.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)


STUDY = Study(
  name="quest_scaling",
  title="What a model in few bits is worth",
  source="arXiv:2502.05003, sections 4.2 and 4.3",
  claim="A model trained by QuEST in P bits (weights and inputs) is worth eff(P) of its parameters "
  "at every size and duration, L = A / (N eff(P))^alpha + B / D^beta + E; per bit 4 bits are worth "
  "most; and it is worth more than one trained by LSQ, by STE, or without the Hadamard rotation.",
  published="eff 0.02, 0.15, 0.43, 0.69, 1.02 at 1, 2, 3, 4 and 8 bits, so 16 eff / P of 0.33, "
  "1.22, 2.31, 2.77 and 2.03; FP4 0.63; LSQ 0.12 and 0.56 at 2 and 4 bits (30 to 800 million "
  "parameters on C4, D/N about 100).",
  setting=f"{SETTING} Here SwiGLU has the width 2 D; all matmuls of the layers have P bits, "
  "embedding, norms and head are plain. Four sizes: D 16 and 32, one and two layers, 2.6 to 21 "
  "thousand parameters without embedding and head; 20 and 60 bytes for each of them; rows of 64 "
  "bytes in batches of 8; rate 0.01 for all, 10 steps of warm-up, cosine to 0. Hadamard blocks of "
  "the model's width. STE: absmax of each row and token. LSQ: a step for each matrix and input, "
  "started for normal values, not decayed. None of the three has a level at 0. Two seeds, for "
  "weights and order of the text; one for LSQ, STE and no Hadamard at 60. Left out: LSQ and STE at "
  "FP4, which is not equally spaced; LSQ, STE and no Hadamard at 1, 3 and 8 bits, and no Hadamard "
  "at FP4, for time. Intervals: runs of one size, duration and seed are drawn together, with "
  "replacement. The largest model is also trained on 1.5 bytes per parameter: a run as short as "
  "those that let bits look free. Runs go one after another on CPU (two seeds under vmap took 0.8 "
  "of the time per step at D 16, and no less at 32), together on a GPU (D 128 and 256, 20 and 40 "
  "bytes for each parameter).",
  refuted_by="Reproduced: in 95 % of resamples 4 bits have the largest eff(P) / P of 1, 2, 3, 4, 8 "
  "and 16, and the 95 % intervals of QuEST's eff over that of LSQ, STE and no Hadamard lie above 1 "
  "at 2 and at 4 bits. Refuted: another P is best in 95 %, or the intervals of a method lie below "
  "1 at both. Undecided: no refutation, and 4 bits are best in less than 95 %. Direction only: 4 "
  "bits are best, and a method is not decided. Nothing is concluded from fewer than four sizes.",
  cannot_show="The published values: eff goes with alpha and with N, and layers of a few thousand "
  "parameters under a plain head of 4 to 8 thousand are another model than 30 million on C4. The "
  "order of QuEST and LSQ at 30 million parameters and D/N 100.",
  measure=measure,
  conclude=conclude,
  draw=draw,
)

if __name__ == "__main__":
  main(STUDY)
