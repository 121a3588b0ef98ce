"""Draws the loss of a run beside what it has to beat, and the curves of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxlm.config import check
from jaxlm.run.run_folder import RunFolder, read_records
from pallas_kernels.common.errors import UserError, import_extra


def draw_loss(folder: RunFolder, baselines: Mapping[str, float]) -> None:
  """Draws metrics.jsonl and eval.jsonl in bits per byte into loss.png; `baselines` as lines.

  Turns training loss into bits per byte by the held-out text's tokens per byte. Raises
  MissingExtraError without matplotlib.
  """
  new_figure = import_extra("matplotlib.figure", "plot", "drawing curves").Figure
  steps, losses = (
    np.array([record[key] for record in read_records(folder.metrics)]) for key in ("step", "loss")
  )
  evals = list(read_records(folder.evals))
  bits = np.array([record["bits_per_byte"] for record in evals])
  scale = bits[-1] / evals[-1]["heldout_loss"]

  figure = new_figure(figsize=(7, 4.2), layout="constrained")
  axes = figure.subplots()
  axes.plot(steps, scale * losses, color="tab:blue", alpha=0.25, linewidth=0.8)
  axes.plot(steps, scale * _smooth(losses), color="tab:blue", label="training, running mean")
  axes.plot(
    [record["step"] for record in evals],
    bits,
    "o-",
    color="tab:red",
    markersize=4,
    label="held-out",
  )
  for name, value in baselines.items():
    axes.axhline(value, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
      f"{name} {value:.2f}",
      (1, value),
      xycoords=("axes fraction", "data"),
      ha="right",
      va="bottom",
      color="gray",
    )
  axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None), xlim=(0, steps[-1]))
  axes.set_title(
    f"{folder.path.name}: held-out {bits[-1]:.3f} bits per byte after {steps[-1]} steps", loc="left"
  )
  axes.legend(frameon=False)
  figure.savefig(folder.plot, dpi=150)


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
  names = [folder.path.name for folder in folders]
  for index, folder in enumerate(folders):
    records = list(read_records(folder.metrics)) if folder.metrics.is_file() else []
    if not records:
      raise UserError(f"run={str(folder.path)!r}: holds no metrics.jsonl with a whole line")
    color = f"C{index % 10}"
    steps, loss, norm, rate = (
      np.array([record[key] for record in records])
      for key in ("step", "loss", "grad_norm", "learning_rate")
    )
    name = names[index] if names.count(names[index]) == 1 else str(folder.path)
    for axes, values in ((losses, loss), (norms, norm)):
      axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      axes.plot(steps, _smooth(values), color=color, label=name)
    rates.plot(steps, rate, color=color)
    evals = list(read_records(folder.evals)) if folder.evals.is_file() else []
    losses.plot(
      [e["step"] for e in evals], [e["heldout_loss"] for e in evals], "o", color=color, markersize=4
    )
  losses.set(title="loss, nats per token (dots: held-out)", xlabel="step")
  norms.set(title="gradient norm before clipping", xlabel="step", yscale="log")
  rates.set(title="learning rate", xlabel="step", ylim=(0, None))
  losses.legend(frameon=False)
  figure.savefig(path, dpi=150)


def _smooth(losses: np.ndarray, share: float = 0.04) -> np.ndarray:
  """Returns, at each step, the mean of the last `share` of the curve, without what is not finite."""
  width = max(1, int(share * len(losses)))
  finite = np.isfinite(losses)
  sums, counts = (
    np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, losses, 0.0), finite)
  )
  first = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
  with np.errstate(invalid="ignore"):
    return (sums[1:] - sums[first]) / (counts[1:] - counts[first])
