"""Recall of key-value pairs against what a mixer remembers (arXiv:2312.04927)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.study import Finding, Scale, Study, main
from experiments.synthetic import AnswersTask, answers_config, mixer, stacked
from jaxlm.config import TrainConfig, check
from jaxlm.data.synthetic.mqar import mqar
from jaxlm.scaling.sweep import Executor, Row, sweep

SPARSE = {"length": 4, "stride": 2, "block": 4, "count": 6, "window": 8}
LAYERS = {
  "attention": ["attention", "attention"],
  "conv + attention": ["conv", "attention"],
  "conv": ["conv", "conv"],
  "linear": ["linear", "linear"],
  "gated delta": ["gated_delta", "gated_delta"],
  "kda": ["kda", "kda"],
  "conv + nsa": ["conv", "nsa"],
}
RATE = "optimizer.learning_rate"
LEARNT = 0.5
"""recall of attention after a convolution below which the other mixers' says nothing"""


class Plan(NamedTuple):
  """Holds what is trained at one scale."""

  V: int
  T: int
  pairs: int
  widths: list[int]
  steps: int
  batch: int
  seeds: int
  rates: tuple[float, ...]
  """of which each mixer and width has its best"""


PLANS: dict[Scale, Plan] = {
  "smoke": Plan(32, 32, 4, [16], 30, 16, 1, (0.01,)),
  "cpu": Plan(64, 64, 16, [16, 32], 600, 32, 2, (0.005, 0.01)),
  "gpu": Plan(8192, 256, 16, [32, 64, 128], 2000, 256, 2, (0.003,)),
}


def base(scale: Scale) -> TrainConfig:
  """Returns the run that all runs differ from."""
  plan, on_gpu = PLANS[scale], scale == "gpu"
  config = answers_config(steps=plan.steps, batch=plan.batch, length=plan.T, on_gpu=on_gpu)
  return dataclasses.replace(config, eval_batches=max(256 // plan.batch, 1))


def make_task(config: TrainConfig, layers: str, D: int, V: int, pairs: int) -> Any:
  """Returns the configuration with its model, and associative recall with so many pairs."""
  mixers = [mixer(name, D, sparse=SPARSE) for name in LAYERS[layers]]
  config = dataclasses.replace(config, model=stacked(mixers, D, V, F=D))
  draw = functools.partial(mqar, V=V, T=config.data.length, pairs=pairs)
  return config, AnswersTask(config, draw)


def measure(scale: Scale, table: Path, executor: Executor | None) -> None:
  """Trains every mixer at every width and rate."""
  plan = PLANS[scale]
  task = {"task.V": plan.V, "task.pairs": plan.pairs}
  points = [
    {"task.layers": layers, "task.D": D, RATE: rate, "seed": seed} | task
    for layers in LAYERS
    for D in plan.widths
    for rate in plan.rates
    for seed in range(plan.seeds)
  ]
  sweep(base(scale), points, table, make_task=make_task, executor=executor)


def best_rows(rows: list[Row], layers: str) -> dict[int, list[Row]]:
  """Returns width -> the rows of all seeds at the rate whose mean accuracy is the highest."""
  by_width: dict[int, list[Row]] = {}
  own = [row for row in rows if row["task.layers"] == layers]
  for D in sorted({row["task.D"] for row in own}):
    rates = {row[RATE] for row in own if row["task.D"] == D}
    of_rates = [[r for r in own if r["task.D"] == D and r[RATE] == rate] for rate in sorted(rates)]
    by_width[D] = max(of_rates, key=accuracy)
  return by_width


def accuracy(rows: list[Row]) -> float:
  """Returns the mean over seeds."""
  return float(np.mean([row["accuracy"] for row in rows]))


def conclude(rows: list[Row]) -> Finding:
  best = {layers: best_rows(rows, layers) for layers in LAYERS}
  by_layers = {
    layers: {D: accuracy(own) for D, own in of_width.items()}
    for layers, of_width in best.items()
    if of_width
  }
  check(by_layers.keys() == LAYERS.keys(), "layers", list(by_layers), "all mixers are needed")
  least = min(row["step"] for row in rows)
  check(least >= 300, "steps", least, "recall is not learnt in fewer than 300")
  widest = {name: of_width[max(of_width)] for name, of_width in by_layers.items()}
  narrow = {name: of_width[min(of_width)] for name, of_width in by_layers.items()}
  verdict, why = judge(widest, narrow)
  chance = 1 / rows[0]["task.pairs"]
  lines = [
    f"{name}: "
    + ", ".join(f"D {D} {value:.3f} at rate {best[name][D][0][RATE]}" for D, value in own.items())
    for name, own in by_layers.items()
  ]
  lines.append(f"guessing among the values of the row: {chance:.3f}")
  lines += compare(by_layers)
  ours = ", ".join(f"{name} {value:.2f}" for name, value in widest.items())
  seeds = len({row["seed"] for row in rows})
  return Finding(
    ours=f"accuracy at D {max(by_layers['conv'])}: {ours}",
    interval=f"means over {seeds} seeds at the best rate",
    verdict=verdict,  # type: ignore[arg-type]
    why=why,
    lines=tuple(lines),
  )


def judge(widest: dict[str, float], narrow: dict[str, float]) -> tuple[str, str]:
  """Returns the verdict on the recall of each mixer at the largest and smallest width, and why."""
  whole, conv, linear = (widest[name] for name in ("conv + attention", "conv", "linear"))
  delta = min(widest["gated delta"], widest["kda"])
  if whole < LEARNT:
    return "undecided", "Attention after a convolution has not learnt the task."
  broken = []
  if whole < delta - 0.02:
    broken.append(f"attention after a convolution, {whole:.3f}, recalls less than delta rules")
  if delta <= linear + 0.1:
    broken.append(
      f"the weaker delta rule, {delta:.3f}, does not recall 0.1 more than linear attention, "
      f"{linear:.3f}"
    )
  if linear <= conv:
    broken.append(f"linear attention, {linear:.3f}, recalls no more than convolutions, {conv:.3f}")
  if broken:
    return "refuted", f"Not the published order at the largest width: {'; '.join(broken)}."
  if whole > 0.99 and delta > 0.95 and conv < 0.3 and narrow["linear"] < 0.6:
    return "reproduced", (
      "Attention after a convolution recalls all pairs, delta rules with a state of fixed size "
      "too, linear attention part of them, convolutions few."
    )
  return "direction only", "The order is the published one, the levels are not."


def compare(by_layers: dict[str, dict[int, float]]) -> list[str]:
  """Returns a line for each part of the claim, on all widths."""

  def difference(name: str, less: str) -> str:
    by_width = {D: value - by_layers[less][D] for D, value in by_layers[name].items()}
    return f"{name} minus {less}: " + ", ".join(f"D {D} {x:+.3f}" for D, x in by_width.items())

  worst = min(by_layers["conv + attention"].values())
  part = "every pair" if worst > 0.99 else f"{worst:.3f} of the pairs"
  return [
    f"attention after a convolution recalls {part} at its worst width",
    difference("linear", "conv"),
    difference("gated delta", "linear"),
    difference("kda", "linear"),
    difference("kda", "gated delta"),
  ]


def draw(rows: list[Row], figure: Any) -> None:
  axes = figure.subplots()
  for layers in LAYERS:
    best = best_rows(rows, layers).values()
    states = [own[0]["state"] for own in best]
    (line,) = axes.plot(states, [accuracy(own) for own in best], "-", label=layers)
    seeds = [(row["state"], row["accuracy"]) for own in best for row in own]
    axes.plot(*zip(*seeds), ".", color=line.get_color())
  axes.set(xscale="log", xlabel="numbers kept to decode, per row", ylabel="recall", ylim=(0, 1.02))
  axes.legend(frameon=False, fontsize=8)


STUDY = Study(
  name="mqar",
  title="Multi-query associative recall against state size",
  source="arXiv:2312.04927, figure 2; arXiv:2510.26692, figure 4",
  claim="Attention recalls every pair at any width; gated convolutions and linear attention recall "
  "as many as their width and state allow; delta rules recall far more in a state as large.",
  published="Attention solves all lengths at all widths, gated convolutions need a width that "
  "grows with the length (figure 2); KDA is at least the gated delta rule everywhere, and a "
  "recurrence that only decays fails (Kimi Linear, figure 4).",
  setting="Two layers of one head of width D, SwiGLU of width D (the recipe has none), rotary "
  "embedding in place of learned positions, tied head. Fresh rows at every step: 64 positions, 64 "
  "ids, 16 pairs, filler 0, queries by the published power law; on a GPU 256 positions and 8192 "
  "ids. AdamW, cosine, 600 steps of 32 rows; each mixer and width has the better of rates 0.005 "
  "and 0.01 (GPU: 0.003), as the source has it. Delta rules and linear attention have convolutions "
  "of 4 taps on q, k and v; the others' convolutions are gated, with 3 taps. Sparse attention: "
  "blocks of 4 every 2, 6 selected blocks of 4, window 8. State: the numbers of a decode cache "
  "after 64 positions. Accuracy over 256 held-out rows.",
  refuted_by="Reproduced: at the largest width convolution + attention above 0.99, both delta "
  "rules above 0.95 and convolutions below 0.3, and linear attention below 0.6 at the smallest. "
  "Direction only, at the largest width: convolution + attention >= the weaker delta rule (to "
  "0.02) > linear attention + 0.1, which is above convolutions. Refuted: another order. Undecided: "
  "convolution + attention below 0.5 there. Each part of the claim has a line of its own.",
  cannot_show="Language: recall is 6 % of its tokens. Plain attention, and delta rules where they "
  "are narrow, may need many more steps than these to find the same solution.",
  measure=measure,
  conclude=conclude,
  draw=draw,
)

if __name__ == "__main__":
  main(STUDY)
