"""Detects steps whose loss or gradient is not finite, or whose loss jumps; reports, or stops.

The step itself leaves out an update that is not finite (`jaxlm.train.step`), so that a bad one
never reaches a checkpoint.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.run.metrics import print_status
from jaxlm.run.run_folder import RunFolder, read_records, to_line
from pallas_kernels.common.errors import UserError
from sharding.multihost import is_main

WINDOW = 64  # losses that a new one is compared with
FEWEST = 16  # of these, before anything counts as a spike
_REMEMBERED = WINDOW + 2
_ROWS = "rows_in_batch"  # beside the arrays of a saved batch
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves has deviations near 0


class BadStep(FloatingPointError):
  """Stops a run at a step with bad numbers; the message names the step and where its batch is."""


class Guard:
  """Checks the loss of each step of a run.

  Its limits depend on the losses alone, so a resumed or replayed run has the same ones.
  """

  def __init__(self, config: TrainConfig, folder: RunFolder, start: int):
    self.config, self.folder = config, folder
    records = list(read_records(folder.metrics)) if folder.metrics.exists() else []
    records = [record for record in records if record["step"] <= start]
    self.losses = {record["step"]: record["loss"] for record in records[-_REMEMBERED:]}
    self.skipped = sum(record.get("skipped", 0) for record in records)

  def limit(self, step: int) -> float:
    """Returns the loss above which `step` makes no update; infinite unless `spike` is `skip`."""
    return self._spike_limit(step) if self.config.spike == "skip" else math.inf

  def is_spike(self, step: int, loss: float) -> bool:
    """Returns whether `loss` is finite but far above those of the steps before."""
    return math.isfinite(loss) and loss > self._spike_limit(step)

  def check_step(
    self, step: int, values: Mapping[str, float], batch: Any, rows: np.ndarray
  ) -> None:
    """Prints and saves what is wrong with the numbers of a finished step; counts skipped updates.

    `values` holds "loss", "grad_norm" and "skipped"; `batch` the `rows` of this process. Raises
    BadStep where the configuration wants the run to stop.
    """
    loss, norm = values["loss"], values["grad_norm"]
    spike, limit = self.is_spike(step, loss), self._spike_limit(step)
    self.losses[step] = loss
    self.losses.pop(step - _REMEMBERED, None)
    self.skipped += values["skipped"]
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and not spike:
      return
    message = f"step {step}: loss {loss}, gradient norm {norm}"
    if spike:
      size = self.config.spike_size
      message += f"; the losses before allow {limit:.4f} (spike_size={size})"
    if values["skipped"]:
      message += f"; its update was left out, {self.skipped:.0f} so far"
    if (self.config.spike if finite else self.config.nonfinite) != "stop":
      print_status(message)
      return
    saved = save_step(self.folder.bad_steps, step, values, batch, rows, self.config.batch)
    replay = f"jaxlm replay {self.folder.name} --step {step}"
    message += f"; nothing is saved after it. Its batch is in {saved}; what went wrong: {replay}"
    raise BadStep(message)

  def _spike_limit(self, step: int) -> float:
    """Returns the median + spike_size median absolute deviations of earlier losses.

    It takes those up to two steps before, because the last ones have not been read yet.
    """
    window = range(step - 1 - WINDOW, step - 1)
    known = [loss for at, loss in self.losses.items() if at in window and math.isfinite(loss)]
    if len(known) < FEWEST:
      return math.inf
    median = statistics.median(known)
    deviation = statistics.median(abs(loss - median) for loss in known)
    return median + self.config.spike_size * max(deviation, LEAST_DEVIATION * abs(median))


def save_step(
  folder: Path,
  step: int,
  values: Mapping[str, float],
  batch: Any,
  rows: np.ndarray,
  batch_size: int,
) -> Path:
  """Writes the numbers of a step and its batch into `folder`/STEP, each process its own rows.

  `rows` are the places in the batch of `batch_size` rows that the arrays of `batch` hold.
  """
  target = folder / f"{step:08d}"
  target.mkdir(parents=True, exist_ok=True)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="/") or "batch": array
    for path, array in jax.tree_util.tree_leaves_with_path(batch)
  }
  named: dict[str, Any] = {_ROWS: rows, **arrays}
  np.savez(target / f"rows_of_process_{jax.process_index()}.npz", **named)
  if is_main():
    record = {"step": step, "batch": batch_size, **values}
    write_text(target / "step.json", to_line(record))
  return target


def load_batch(folder: Path, step: int) -> dict[str, np.ndarray] | None:
  """Returns the arrays of the whole batch that `save_step` wrote, or None where it wrote none.

  Their names are their paths in the batch, such as "inputs_BT". Raises UserError where rows are
  missing, because the file of some process is.
  """
  source = folder / f"{step:08d}"
  if not (source / "step.json").is_file():
    return None
  size = json.loads((source / "step.json").read_text())["batch"]
  parts = [dict(np.load(path, allow_pickle=False)) for path in source.glob("rows_of_process_*.npz")]
  rows_of_parts = [part.pop(_ROWS) for part in parts]
  missing = np.setdiff1d(np.arange(size), np.concatenate([*rows_of_parts, np.array([], int)]))
  if len(missing):
    raise UserError(f"{source}: rows {missing.tolist()} of the batch of {size} are missing")
  whole = {name: np.empty((size, *x.shape[1:]), x.dtype) for name, x in parts[0].items()}
  for part, rows in zip(parts, rows_of_parts):
    for name, local in part.items():
      whole[name][rows] = local
  return whole
