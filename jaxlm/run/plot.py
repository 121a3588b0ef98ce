"""Draws a run's loss beside what it has to beat, and the curves of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import check
from jaxlm.run.run_folder import NO_FOLDER, RunFolder, read_records
from pallas_kernels.common.errors import UserError, import_extra


def draw_loss(folder: RunFolder, references: Mapping[str, float]) -> None:
  """Draws metrics.jsonl and eval.jsonl into loss.png; `references` are horizontal lines.

  Where evaluations give bits per byte, the curves are in these: the training loss is converted by
  the held-out text's tokens per byte. Other values of evaluations have a panel each, but for
  counts. Raises MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing curves").Figure
  records = list(read_records(folder.metrics))
  steps = np.array([record["step"] for record in records])
  losses = np.array([record["loss"] for record in records])
  evals = list(read_records(folder.evals)) if folder.evals.is_file() else []
  last = evals[-1] if evals else {}
  in_bits = "bits_per_byte" in last
  unit, heldout = ("bits per byte", "bits_per_byte") if in_bits else ("loss", "heldout_loss")
  scale = last["bits_per_byte"] / last["heldout_loss"] if in_bits else 1.0
  others = [
    name
    for name, value in last.items()
    if isinstance(value, float) and name not in ("heldout_loss", "bits_per_byte")
  ]

  figure = new_figure(figsize=(7 + 4 * len(others), 4.2), layout="constrained")
  axes, *panels = np.ravel(figure.subplots(1, 1 + len(others)))
  axes.plot(steps, scale * losses, color="tab:blue", alpha=0.25, linewidth=0.8)
  axes.plot(steps, scale * _smooth(losses), color="tab:blue", label="training, running mean")
  if heldout in last:
    _draw_evaluations(axes, evals, heldout)
  for name, value in references.items():
    axes.axhline(value, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
      f"{name} {value:.2f}",
      (1, value),
      xycoords=("axes fraction", "data"),
      ha="right",
      va="bottom",
      color="gray",
    )
  axes.set(xlabel="step", ylabel=unit, ylim=(0, None), xlim=(0, steps[-1]))
  shown = f"held-out {last[heldout]:.3f}" if heldout in last else f"{losses[-1]:.3f}"
  axes.set_title(f"{folder.path.name}: {shown} {unit} after {steps[-1]} steps", loc="left")
  axes.legend(frameon=False)
  for panel, name in zip(panels, others):
    _draw_evaluations(panel, evals, name)
    panel.set(xlabel="step", xlim=(0, steps[-1]))
    panel.set_title(name.replace("_", " "), loc="left")
  figure.savefig(folder.plot, dpi=150)


def _draw_evaluations(axes: Any, evals: Sequence[Mapping[str, Any]], name: str) -> None:
  """Draws one value of all evaluations over their steps."""
  steps = [record["step"] for record in evals]
  values = [record[name] for record in evals]
  axes.plot(steps, values, "o-", color="tab:red", markersize=4, label="held-out")


def draw_runs(folders: Sequence[RunFolder], path: Path) -> None:
  """Draws loss (held-out: dots), gradient norm and learning rate of runs into one picture.

  Reads metrics up to a line that is cut. Raises UserError for a folder without metrics or an ending
  of `path` that matplotlib does not know, MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing curves").Figure
  figure = new_figure(figsize=(12, 4.2), layout="constrained")
  kinds = figure.canvas.get_supported_filetypes()
  check(path.suffix[1:] in kinds, "out", str(path), f"must end in one of {', '.join(kinds)}")
  losses, norms, rates = figure.subplots(1, 3)
  names = [folder.name.rpartition("/")[2] for folder in folders]
  for index, folder in enumerate(folders):
    records = list(read_records(folder.metrics)) if folder.metrics.is_file() else []
    if not records:
      rule = "holds no metrics.jsonl with a whole line" if folder.path.is_dir() else NO_FOLDER
      raise UserError(f"run={str(folder.path)!r}: {rule}")
    color = f"C{index % 10}"
    steps, loss, norm, rate = (
      np.array([record[key] for record in records])
      for key in ("step", "loss", "grad_norm", "learning_rate")
    )
    name = _label(names[index] if names.count(names[index]) == 1 else folder.name)
    for axes, values in ((losses, loss), (norms, norm)):
      axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      axes.plot(steps, _smooth(values), color=color, label=name)
    rates.plot(steps, rate, color=color)
    evals = list(read_records(folder.evals)) if folder.evals.is_file() else []
    known = [record for record in evals if "heldout_loss" in record]
    dots = ([record[key] for record in known] for key in ("step", "heldout_loss"))
    losses.plot(*dots, "o", color=color, markersize=4)
  losses.set(title="loss (dots: held-out)", xlabel="step")
  norms.set(title="gradient norm before clipping", xlabel="step", yscale="log")
  rates.set(title="learning rate", xlabel="step", ylim=(0, None))
  losses.legend(frameon=False)
  figure.savefig(path, dpi=150)


def _label(name: str) -> str:
  """Returns a name that matplotlib writes as it is, neither as a formula nor hidden."""
  text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
  return f"\u200b{text}" if text.startswith("_") else text


def _smooth(losses: np.ndarray, share: float = 0.04) -> np.ndarray:
  """Returns the mean of the last `share` of the curve at each step, without what is not finite."""
  width = max(1, int(share * len(losses)))
  finite = np.isfinite(losses)
  sums, counts = (
    np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, losses, 0.0), finite)
  )
  first = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
  with np.errstate(invalid="ignore"):
    return (sums[1:] - sums[first]) / (counts[1:] - counts[first])
