"""Native sparse attention, its window alone and full attention at equal parameters (2502.11089)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import small_text
from experiments.study import Finding, Scale, Study, main
from experiments.synthetic import AnswersTask, answers_config, mixer, stacked
from jaxlm.config import ModelConfig, TrainConfig, check
from jaxlm.data.synthetic.long_context import needle
from jaxlm.scaling.flops import parameter_count
from jaxlm.scaling.intervals import interval
from jaxlm.scaling.sweep import Executor, Row, sweep, text_tasks
from jaxlm.train.task import Task

KINDS = {"full": "attention", "nsa": "nsa", "window": "window"}
_make_text_task = text_tasks()


class Plan(NamedTuple):
  """Holds what is trained at one scale."""

  T: int
  D: int
  N: int
  sparse: dict[str, int]
  """sizes of native sparse attention; the window is the windowed model's too"""
  V: int
  names: int
  steps: tuple[int, int]
  """of needles, of text"""
  batch: tuple[int, int]
  seeds: int
  kinds: tuple[str, ...] = tuple(KINDS)


def _sizes(length: int, block: int, count: int, window: int) -> dict[str, int]:
  return {
    "length": length,
    "stride": length // 2,
    "block": block,
    "count": count,
    "window": window,
  }


PLANS: dict[Scale, Plan] = {
  "smoke": Plan(32, 8, 1, _sizes(4, 4, 3, 4), 24, 4, (20, 20), (8, 4), 1, ("full", "nsa")),
  "cpu": Plan(128, 32, 1, _sizes(4, 8, 6, 16), 40, 8, (1100, 300), (32, 16), 3),
  "gpu": Plan(4096, 256, 4, _sizes(32, 64, 16, 512), 1024, 32, (800, 400), (8, 8), 3),
}


def matched(kind: str, D: int, N: int, V: int, sparse: dict[str, int]) -> ModelConfig:
  """Returns a convolution and this attention, as large as with native sparse attention.

  That one's SwiGLU has the width D; where attention has fewer parameters it is wider.
  """

  def model(name: str, F: int) -> ModelConfig:
    return stacked([mixer("conv", D), mixer(name, D, N=N, sparse=sparse)], D, V, F=F)

  target, own = (parameter_count(model(name, D)).blocks for name in ("nsa", KINDS[kind]))
  return model(KINDS[kind], D + round((target - own) / (2 * 3 * D)))


def make_task(config: TrainConfig, task: str, kind: str, scale: Scale) -> tuple[TrainConfig, Task]:
  """Returns the configuration with its model, and needles or text."""
  plan = PLANS[scale]
  V = plan.V if task == "needle" else 256
  model = matched(kind, plan.D, plan.N, V, plan.sparse)
  config = dataclasses.replace(config, model=model)
  if task == "text":
    return _make_text_task(config)
  draw = functools.partial(needle, V=V, T=plan.T, names=plan.names, needles=4, questions=4)
  return config, AnswersTask(config, draw)


def measure(scale: Scale, table: Path, executor: Executor | None) -> None:
  """Trains the three models on needles and on text."""
  plan, on_gpu = PLANS[scale], scale == "gpu"
  text = small_text.base(scale)
  text = dataclasses.replace(
    text,
    batch=plan.batch[1],
    eval_batches=4 if scale == "smoke" else small_text.EVALUATED // (plan.batch[1] * plan.T),
    data=dataclasses.replace(text.data, length=plan.T),
  )
  rates = (0.001, 0.002) if on_gpu else (0.005, 0.01)
  needles = answers_config(
    steps=plan.steps[0], batch=plan.batch[0], length=plan.T, rate=rates[0], on_gpu=on_gpu
  )
  needles = dataclasses.replace(
    needles, eval_batches=4 if scale == "smoke" else 256 // plan.batch[0]
  )
  for task, config, steps, rate in zip(("needle", "text"), (needles, text), plan.steps, rates):
    points = [
      {"task.task": task, "task.kind": kind, "task.scale": scale, "seed": seed}
      | {"steps": steps, "optimizer.learning_rate": rate}
      for kind in plan.kinds
      for seed in range(plan.seeds)
    ]
    sweep(config, points, table, make_task=make_task, executor=executor)


def _values(rows: list[Row], task: str, kind: str) -> np.ndarray:
  """Returns a task's number of each seed: accuracy of needles, loss of text."""
  own = [r for r in rows if r["task.task"] == task and r["task.kind"] == kind]
  name = "accuracy" if task == "needle" else "heldout_loss"
  return np.array([row[name] for row in sorted(own, key=lambda row: row["seed"])])


def conclude(rows: list[Row]) -> Finding:
  recall = {kind: _values(rows, "needle", kind) for kind in KINDS}
  loss = {kind: _values(rows, "text", kind) for kind in KINDS}
  counts = {len(values) for values in (*recall.values(), *loss.values())}
  check(len(counts) == 1 and min(counts) >= 2, "seeds", counts, "every run needs two or more")
  learnt = float(recall["full"].mean())
  check(learnt > 0.8, "accuracy", learnt, "full attention has not learnt to find needles")
  excess, low, high = interval(100 * (loss["nsa"] / loss["full"] - 1))
  windowed = interval(100 * (loss["window"] / loss["full"] - 1))
  mean = {kind: float(values.mean()) for kind, values in recall.items()}
  gap = interval(recall["nsa"] - recall["window"])
  finds, fails = mean["nsa"] >= 0.95 * mean["full"], mean["window"] < 0.5 * mean["full"]
  if high < 1 and finds and fails:
    verdict, why = "reproduced", "Text costs at most 1 % more loss, and needles are found."
  elif low > 1 or gap[1] <= 0:
    verdict = "refuted"
    why = "Text costs over 1 %." if low > 1 else "Needles are found no better than by a window."
  else:
    verdict, why = "direction only", "It finds more needles than its window alone; "
    why += "the interval of text holds 1 %." if high >= 1 else "but not as many as claimed."
  sizes = {row["task.kind"]: row["parameters"] for row in rows if row["task.task"] == "text"}
  lines = [
    "needles found: " + ", ".join(f"{kind} {value:.3f}" for kind, value in mean.items()),
    f"sparse minus window: {gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})",
    "loss of text: " + ", ".join(f"{kind} {v.mean():.4f}" for kind, v in loss.items()),
    f"window alone over full: {windowed[0]:+.2f} % ({windowed[1]:+.2f} to {windowed[2]:+.2f})",
    "parameters of the models of text: " + ", ".join(f"{k} {n}" for k, n in sizes.items()),
  ]
  return Finding(
    ours=f"text costs {excess:+.2f} % of the loss of full attention; needles found "
    f"{mean['nsa']:.2f} (full {mean['full']:.2f}, window {mean['window']:.2f})",
    interval=f"{low:+.2f} to {high:+.2f} %, 95 % over {len(loss['nsa'])} paired seeds",
    verdict=verdict,  # type: ignore[arg-type]
    why=why,
    lines=tuple(lines),
  )


def draw(rows: list[Row], figure: Any) -> None:
  panels = figure.subplots(1, 2)
  for axes, task, label in zip(
    panels, ("needle", "text"), ("needles found", "loss, nats per byte")
  ):
    for place, kind in enumerate(KINDS):
      values = _values(rows, task, kind)
      axes.plot([place] * len(values), values, "k.")
      axes.plot([place - 0.2, place + 0.2], [values.mean()] * 2)
    axes.set(xticks=range(len(KINDS)), ylabel=label)
    axes.set_xticklabels(KINDS)
  panels[0].set_ylim(0, 1.05)


STUDY = Study(
  name="nsa_vs_full",
  title="Native sparse attention, its window alone and full attention",
  source="arXiv:2502.11089, sections 4 and 5",
  claim="At equal parameters native sparse attention loses nothing against full attention on "
  "text, and finds needles that its window alone cannot see.",
  published="General benchmarks 0.456 against 0.443 for full attention, LongBench 0.469 against "
  "0.437 (27B parameters, 270B tokens).",
  setting="A gated convolution of 3 taps, then attention with one head of 32; D 32, rotary "
  "embedding, tied head. Sparse attention: blocks of 4 every 2, 6 selected blocks of 8, window "
  "16, a compression of its own for keys and for values, 128 positions; the windowed model sees "
  "16 keys. SwiGLU is wider where attention has fewer parameters, so that the models of a task "
  "differ by less than 1 %. Needles: 4 facts among noise of 30 ids, 8 names, all asked for, 1,100 "
  "steps of 32 fresh rows, AdamW, rate 0.005, cosine; accuracy over 256 held-out rows. Text: "
  "bytes of the interpreter's own standard library, 300 steps of 16 rows, warm-up, constant rate "
  "0.01 and decay; loss over 65,536 held-out bytes. 3 seeds. (GPU: D 256, 4096 positions, the "
  "paper's blocks and window.)",
  refuted_by="Reproduced: the 95 % interval of the loss over that of full attention, paired by "
  "seed, lies below +1 %; sparse attention finds 0.95 of the needles that full attention finds, "
  "its window less than half of them. Refuted: that interval lies above 1 %, or the interval of "
  "needles found, sparse minus window, holds 0. Direction only: all else. Undecided where full "
  "attention finds less than 0.8.",
  cannot_show="Speed, and contexts of a thousand blocks: 6 of 16 are selected here, in the paper "
  "16 of 1024. A single layer of attention cannot make up for what its blocks miss.",
  measure=measure,
  conclude=conclude,
  draw=draw,
)

if __name__ == "__main__":
  main(STUDY)
