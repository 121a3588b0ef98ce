"""What the rows of the study say: the layers and tasks compared, verdict and figure."""

# T tasks, R seeds

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.study import Finding
from jaxlm.config import check
from jaxlm.scaling.intervals import interval
from jaxlm.scaling.sweep import Row

HYBRID = "3 kda + 1 full"
LAYERS = {
  "full": ["attention"] * 4,
  HYBRID: ["kda"] * 3 + ["nope"],
  "kda": ["kda"] * 4,
  "decay only": ["gla"] * 4,
}
TASKS = ("palindrome", "stack", "mqar")
DECODED = ("full", HYBRID, "kda")
LEARNT = 0.5
"""accuracy, the mean over seeds, from which on a task counts as learnt"""


def recalls(rows: list[Row]) -> dict[str, np.ndarray]:
  """Returns layers -> accuracies, [tasks, seeds]."""
  trained = sorted((r for r in rows if r.get("task.task")), key=lambda row: row["seed"])

  def of_seeds(task: str, layers: str) -> list[float]:
    own = [r for r in trained if r["task.layers"] == layers and r["task.task"] == task]
    return [row["accuracy"] for row in own]

  counts = {len(of_seeds(task, layers)) for task in TASKS for layers in LAYERS}
  rule = "every task and stack of layers needs two seeds or more"
  check(len(counts) == 1 and min(counts) >= 2, "rows", len(trained), rule)
  return {layers: np.array([of_seeds(task, layers) for task in TASKS]) for layers in LAYERS}


def decoded(rows: list[Row], layers: str, name: str) -> dict[int, float]:
  """Returns context -> bytes or milliseconds."""
  own = [r for r in rows if r.get("task.context") and r["task.layers"] == layers]
  return {row["task.context"]: row[name] for row in sorted(own, key=lambda r: r["task.context"])}


def growth(values: dict[int, float]) -> float:
  """Returns the value at the greatest context over that at the smallest."""
  check(len(values) >= 2, "contexts", list(values), "two or more are needed")
  return values[max(values)] / values[min(values)]


def conclude(rows: list[Row]) -> Finding:
  recall = recalls(rows)
  is_learnt_T = np.max([values.mean(axis=1) for values in recall.values()], axis=0) >= LEARNT
  times = {layers: decoded(rows, layers, "milliseconds") for layers in DECODED}
  sizes = {layers: decoded(rows, layers, "bytes") for layers in DECODED}
  longest = max(sizes["full"])
  memory = sizes[HYBRID][longest] / sizes["full"][longest]
  faster = times[HYBRID][longest] / times["full"][longest]
  is_flat = growth(times["kda"]) <= 1.5 and growth(times["full"]) > 4
  if not (is_flat and 0.25 <= memory < 0.27):
    verdict, why = "refuted", "Decoding does not cost what is claimed."
  elif not is_learnt_T.any():
    verdict, why = "undecided", "Decoding costs what is claimed; no layers have learnt a task."
  else:
    verdict, why = judge({layers: values[is_learnt_T] for layers, values in recall.items()})
  if verdict != "undecided" and not is_learnt_T.all():
    unlearnt = ", ".join(task for task, is_learnt in zip(TASKS, is_learnt_T) if not is_learnt)
    verdict = "direction only" if verdict == "reproduced" else verdict
    why += f" No layers have learnt: {unlearnt}."
  return Finding(
    ours=f"at {longest} positions the hybrid's cache has {memory:.3f} of the bytes of full "
    f"attention's and its token takes {faster:.2f} of the time; accuracy: "
    + "; ".join(
      f"{layers} " + ", ".join(f"{t} {v:.2f}" for t, v in zip(TASKS, values.mean(axis=1)))
      for layers, values in recall.items()
    ),
    interval=f"means over {recall['full'].shape[1]} seeds",
    verdict=verdict,  # type: ignore[arg-type]
    why=why,
    lines=(
      *(
        f"{task}: " + describe({layers: values[place] for layers, values in recall.items()})
        for place, task in enumerate(TASKS)
      ),
      *(
        f"a token of {layers}: "
        + ", ".join(
          f"{times[layers][context]:.2f} ms and {size / 1e6:.2f} MB at {context}"
          for context, size in sizes[layers].items()
        )
        for layers in DECODED
      ),
    ),
  )


def judge(recall: dict[str, np.ndarray]) -> tuple[str, str]:
  """Returns the verdict on accuracies [tasks, seeds] of tasks that some layers learn, and why."""
  erasing_TR = recall["kda"] - recall["decay only"]
  erasing, low, high = interval(erasing_TR.mean(axis=0))
  over_full, low_full, high_full = interval((recall[HYBRID] - recall["full"]).mean(axis=0))
  if low > 0 and erasing_TR.mean(axis=1).min() > 0.02 and low_full > -0.02:
    verdict, why = "reproduced", "Erasing helps on every task and the hybrid is no worse"
  elif high < 0 or high_full < -0.02:
    verdict, why = "refuted", "Erasing hurts, or the hybrid is worse"
  else:
    verdict, why = "direction only", "Tasks leave open whether erasing helps or the hybrid is worse"
  return verdict, (
    f"Decoding costs what is claimed. {why} than full attention: erasing adds {erasing:+.3f} "
    f"({low:+.3f} to {high:+.3f}) to the accuracy, mean of the tasks, and the hybrid is at "
    f"{over_full:+.3f} ({low_full:+.3f} to {high_full:+.3f}) against full attention."
  )


def describe(recall: dict[str, np.ndarray]) -> str:
  """Returns what accuracies [seeds] of one task say of erasing and of the hybrid."""
  if max(values.mean() for values in recall.values()) < LEARNT:
    return "no layers have learnt it"
  erasing, low, high = interval(recall["kda"] - recall["decay only"])
  helps = "helps" if low > 0 else "hurts" if high < 0 else "makes no difference that shows"
  over_full, low_full, high_full = interval(recall[HYBRID] - recall["full"])
  worse = "is no" if low_full > -0.02 else "is" if high_full < -0.02 else "may be"
  return (
    f"erasing {helps}, {erasing:+.3f} ({low:+.3f} to {high:+.3f}); the hybrid {worse} worse than "
    f"full attention, {over_full:+.3f} ({low_full:+.3f} to {high_full:+.3f})"
  )


def draw(rows: list[Row], figure: Any) -> None:
  bars, time, memory = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
  for place, (layers, values) in enumerate(recalls(rows).items()):
    at = np.arange(len(TASKS)) + 0.2 * (place - 1.5)
    bars.bar(at, values.mean(axis=1), 0.18, label=layers)
    bars.plot(np.repeat(at, values.shape[1]), values.ravel(), "k.", markersize=3)
  bars.set(xticks=range(len(TASKS)), ylabel="accuracy", ylim=(0, 1.35))
  bars.set_xticklabels(TASKS)
  bars.legend(frameon=False, fontsize=7, ncols=2)
  for axes, name, scale in ((time, "milliseconds", 1), (memory, "bytes", 1e-6)):
    for layers in DECODED:
      own = decoded(rows, layers, name)
      axes.plot(list(own), [scale * value for value in own.values()], ".-", label=layers)
    axes.set(xscale="log", yscale="log", xlabel="positions before")
  time.set_ylabel("ms of one more token")
  memory.set_ylabel("cache of a row, MB")
  memory.legend(frameon=False, fontsize=7)
