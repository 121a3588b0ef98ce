"""Shows plans: as a table with a stacked bar for the terminal, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.common.errors import import_extra
from sharding.mesh import describe_sizes
from sharding.plan.search import Plan

_GIB = 2.0**30
_WIDTH = 72
_LETTERS = "CRHABDEFGIJKLMNOPQSTUVWXYZ"


def format_plan(plan: Plan, others: Sequence[Plan] = ()) -> str:
  """Returns memory, times and a stacked bar of one plan, and a line for each of `others`."""
  chip, per_chip = plan.topology.chip, plan.topology.chip.devices_per_chip
  limit = chip.hbm_bytes * per_chip
  lines = [
    f"mesh {describe_sizes(plan.sizes)}, {_micro_batches(plan)}",
    "",
    f"{'memory of a chip':<48}{'GiB':>10}{f'of {limit / _GIB:.0f} GiB':>12}",
  ]
  total = "together" + ("" if plan.fits else ": does not fit")
  for name, size in {**plan.memory, total: plan.memory_bytes}.items():
    lines.append(f"  {name:<46}{size * per_chip / _GIB:>10.2f}{size * per_chip / limit:>12.1%}")
  lines += ["", f"{'time of a step, each part alone':<48}{'s':>10}"]
  shares = stacked_times(plan)
  for letter, (name, seconds) in zip(_LETTERS, shares.items()):
    lines.append(f"  {letter} {name:<44}{seconds:>10.4g}")
  lines += [
    f"  {_bar(list(shares.values()))}",
    f"at least {plan.overlapped:.4g} s if all overlaps that can: {plan.binds} binds, the model's "
    f"FLOPs are {plan.utilisation:.1%} of the peak",
    f"{plan.separate:.4g} s if no collective overlaps",
  ]
  if plan.pads_weights:
    rows = f"a device's {plan.weight_rows} rows of a weight are no multiple of 8"
    lines.append(f"{rows}: the TPU pads them, and its compiler sums whole arrays instead")
  names = [f"{describe_sizes(other.sizes)}, {_micro_batches(other)}" for other in others]
  width = max((len(name) for name in names), default=0) + 2
  if others:
    lines += [
      "",
      f"{'best legal meshes':<{width}}{'GiB':>8}{'at least':>10}{'separate':>10}  binds",
    ]
  for name, other in zip(names, others):
    numbers = f"{other.memory_bytes * per_chip / _GIB:>8.1f}"
    numbers += f"{other.overlapped:>10.4g}{other.separate:>10.4g}"
    lines.append(f"{name:<{width}}{numbers}  {other.binds}")
  return "\n".join(lines)


def stacked_times(plan: Plan) -> dict[str, float]:
  """Returns the times of a plan by name; what stays below a thousandth of a collective is left out.

  HBM is listed as it is, though arithmetic runs beside it.
  """
  least = 1e-3 * plan.separate
  kept = ("compute", "recompute", "hbm")
  return {name: s for name, s in plan.times.items() if name in kept or s >= least}


def _micro_batches(plan: Plan) -> str:
  number = plan.step.accumulate
  schedule = f", {plan.step.schedule}" if plan.sizes["stage"] > 1 else ""
  return f"{number} micro-batch{'es' if number > 1 else ''}{schedule}"


def _bar(values: Sequence[float]) -> str:
  """Returns a stacked bar: each letter takes the share of the width that its value is."""
  total, text = sum(values), ""
  for index, letter in zip(range(len(values)), _LETTERS):
    end = round(_WIDTH * sum(values[: index + 1]) / total)
    text += letter * (end - len(text))
  return text


def draw_plans(plans: Sequence[Plan], path: Path) -> None:
  """Draws stacked bars of time and memory, a row for each plan, into a picture.

  Raises MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing plans").Figure
  colors = import_extra("matplotlib", "plot", "drawing plans").colormaps["tab20"]
  figure = new_figure(figsize=(13, 1.8 + 0.5 * len(plans)), layout="constrained")
  times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
  per_chip = plans[0].topology.chip.devices_per_chip
  rows = [f"{describe_sizes(plan.sizes)}\n{_micro_batches(plan)}" for plan in plans]
  for axes, values, unit in (
    (times, [stacked_times(plan) for plan in plans], "seconds of a step, each part alone"),
    (memory, [{n: per_chip * b / _GIB for n, b in p.memory.items()} for p in plans], "GiB a chip"),
  ):
    names = list(dict.fromkeys(name for parts in values for name in parts))
    left = [0.0] * len(plans)
    for index, name in enumerate(names):
      widths = [parts.get(name, 0.0) for parts in values]
      axes.barh(rows, widths, left=left, label=name, color=colors(index % 20), height=0.7)
      left = [start + width for start, width in zip(left, widths)]
    axes.set(xlabel=unit)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
  times.invert_yaxis()
  for row, plan in enumerate(plans):
    label = "at least" if row == 0 else None
    times.plot([plan.overlapped] * 2, [row - 0.4, row + 0.4], "k-", linewidth=2, label=label)
  limit = plans[0].topology.chip.hbm_bytes * per_chip / _GIB
  memory.axvline(limit, color="black", linestyle="--", linewidth=1)
  figure.suptitle(f"{plans[0].topology.name}: {plans[0].topology.chips} chips")
  figure.savefig(path, dpi=150)
