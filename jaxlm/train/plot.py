"""loss.png: the loss of a run over its steps, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxlm.train.run_folder import RunFolder, read_records


def draw_loss(folder: RunFolder, baselines: Mapping[str, float]) -> None:
  """Draws metrics.jsonl and eval.jsonl in bits per byte into loss.png; `baselines` are horizontal lines.

  Training loss is turned into bits per byte by the held-out text's tokens per byte. Needs matplotlib (extra `plot`).
  """
  from matplotlib.figure import Figure

  steps, losses = (np.array([record[key] for record in read_records(folder.metrics)]) for key in ("step", "loss"))
  evals = list(read_records(folder.evals))
  bits = np.array([record["bits_per_byte"] for record in evals])
  scale = bits[-1] / evals[-1]["heldout_loss"]

  figure = Figure(figsize=(7, 4.2), layout="constrained")
  axes = figure.subplots()
  axes.plot(steps, scale * losses, color="tab:blue", alpha=0.25, linewidth=0.8)
  axes.plot(steps, scale * _smooth(losses), color="tab:blue", label="training, running mean")
  axes.plot([record["step"] for record in evals], bits, "o-", color="tab:red", markersize=4, label="held-out")
  for name, value in baselines.items():
    axes.axhline(value, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
      f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray"
    )
  axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None), xlim=(0, steps[-1]))
  axes.set_title(f"{folder.path.name}: held-out {bits[-1]:.3f} bits per byte after {steps[-1]} steps", loc="left")
  axes.legend(frameon=False)
  figure.savefig(folder.plot, dpi=150)


def _smooth(losses: np.ndarray, share: float = 0.04) -> np.ndarray:
  """Mean over the latest few percent of the curve at each step."""
  width = max(1, int(share * len(losses)))
  sums = np.concatenate([[0.0], np.cumsum(losses)])
  first = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
  return (sums[1:] - sums[first]) / (np.arange(1, len(losses) + 1) - first)
