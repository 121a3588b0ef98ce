"""Draws what the simulator found: a line of text per rank, or a figure for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.common.errors import MissingExtraError
from sharding.pipeline.operations import Op
from sharding.pipeline.simulator import Simulation

_COLOURS = {"F": "#4C78A8", "B": "#54A24B", "W": "#F2A541", "BW": "#2E7D6B"}
_LEGEND = {"F": "forward", "B": "backward, input", "W": "backward, weights", "BW": "backward, both"}


def to_text(simulation: Simulation, width: int = 100) -> str:
  """Returns one line per rank in which equal lengths are equal times, and a line with the bubble.

  A bar starts with its kind and micro-batch as far as they fit ("F3", "B0", "W0"; "X" is B and W in
  one), later stages of a rank in lower case; dots are idle time.
  """
  scale = width / simulation.makespan
  schedule = simulation.schedule
  lines = []
  for rank, actions in enumerate(schedule.actions):
    cells = ["."] * width
    for action, start, end in zip(actions, simulation.starts[rank], simulation.ends(rank)):
      first, last = round(start * scale), round(end * scale)
      label = "+".join(_label(op, schedule.ranks) for op in action)
      cells[first:last] = label[: last - first].ljust(last - first, "-")
    lines.append(f"rank {rank:>2} |{''.join(cells)}|")
  lines.append(describe(simulation))
  return "\n".join(lines)


def describe(simulation: Simulation) -> str:
  """Returns the schedule's name, bubble rate and largest number of live activations in one line."""
  schedule, peak = simulation.schedule, max(simulation.peak_activations)
  return (
    f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches, bubble "
    f"{simulation.bubble_rate:.1%} of {simulation.cost:g}, at most {peak} live activations"
  )


def draw(simulations: Sequence[Simulation], path: Path) -> None:
  """Draws timelines below each other on one time axis into `path` (.png, .pdf, .svg).

  Raises MissingExtraError without matplotlib (extra `plot`).
  """
  try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
  except ImportError as error:
    raise MissingExtraError('timelines need matplotlib: pip install "jaxlm[plot]"') from error
  heights = [simulation.schedule.ranks for simulation in simulations]
  longest = max(simulation.makespan for simulation in simulations)
  figure = Figure(
    figsize=(10, 0.6 + 0.6 * len(heights) + 0.25 * sum(heights)), layout="constrained"
  )
  rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
  for axes, simulation in zip(rows[:, 0], simulations):
    for rank, actions in enumerate(simulation.schedule.actions):
      for action, start, end in zip(actions, simulation.starts[rank], simulation.ends(rank)):
        _draw_action(axes, simulation, rank, action, start, end, longest)
    axes.set(ylim=(simulation.schedule.ranks - 0.5, -0.5), xlim=(0, longest), ylabel="rank")
    axes.set_yticks(range(simulation.schedule.ranks))
    axes.set_title(describe(simulation), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
  kinds = {op.kind for s in simulations for row in s.schedule.actions for a in row for op in a}
  patches = [Patch(color=_COLOURS[kind], label=_LEGEND[kind]) for kind in _LEGEND if kind in kinds]
  if any(len(_stages_of(simulation, 0)) > 1 for simulation in simulations):
    patches.append(Patch(color=_COLOURS["F"], alpha=0.6, label="lighter: a rank's second stage"))
  figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
  rows[-1, 0].set_xlabel("time")
  figure.savefig(path, dpi=200)


def _draw_action(axes, simulation, rank, action, start, end, longest) -> None:
  """Draws one bar, or two halves one above the other where a forward and a backward overlap."""
  height = 0.9 / len(action)
  for i, op in enumerate(action):
    later = op.stage != min(_stages_of(simulation, rank))
    top = rank - 0.45 + i * height
    axes.broken_barh(
      [(start, end - start)],
      (top, height),
      facecolor=_COLOURS[op.kind],
      alpha=0.6 if later else 1.0,
      edgecolor="white",
      linewidth=0.4,
    )
    if (end - start) / longest > 0.011:
      style = dict(ha="center", va="center", fontsize=5 if len(action) == 1 else 4, color="white")
      axes.text((start + end) / 2, top + height / 2, str(op.microbatch), **style)


def _stages_of(simulation: Simulation, rank: int) -> set[int]:
  return {op.stage for action in simulation.schedule.actions[rank] for op in action}


def _label(op: Op, ranks: int) -> str:
  letter = "X" if op.kind == "BW" else op.kind
  return f"{letter if op.stage < ranks else letter.lower()}{op.microbatch}"
