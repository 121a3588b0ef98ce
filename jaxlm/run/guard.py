"""Numbers gone wrong: what a loss may be, and what happens to a step whose numbers are not finite or jump.

The step itself leaves out an update that is not finite (`jaxlm.train.step`), so a bad one never reaches a checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.data.packing import Batch
from jaxlm.run.metrics import print_status
from jaxlm.run.run_folder import RunFolder, read_records
from sharding.multihost import is_main

_log = logging.getLogger("jaxlm")
WINDOW = 64  # losses that a new one is compared with
FEWEST = 16  # of these, before anything counts as a spike
_KEPT = WINDOW + 2
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves has deviations near 0


class Guard:
  """Judges each step of a run. Its borders depend on the losses alone, so a resumed or replayed run has the same."""

  def __init__(self, config: TrainConfig, folder: RunFolder, start: int):
    self.config, self.folder = config, folder
    records = list(read_records(folder.metrics)) if folder.metrics.exists() else []
    records = [record for record in records if record["step"] <= start]
    self.losses = {record["step"]: record["loss"] for record in records[-_KEPT:]}
    self.skipped = sum(record.get("skipped", 0) for record in records)

  def limit(self, step: int) -> float:
    """Above which loss this step's update is left out: no border unless `spike` is `skip`."""
    return self._border(step) if self.config.spike == "skip" else math.inf

  def is_spike(self, step: int, loss: float) -> bool:
    return math.isfinite(loss) and loss > self._border(step)

  def judge(self, step: int, values: Mapping[str, float], batch: Batch, rows: slice) -> None:
    """After a step's numbers are known: says and keeps what is wrong with them, and counts skipped updates.

    Raises FloatingPointError where the configuration wants the run to stop.
    """
    loss, norm = values["loss"], values["grad_norm"]
    spike, border = self.is_spike(step, loss), self._border(step)
    self.losses[step] = loss
    self.losses.pop(step - _KEPT, None)
    self.skipped += values["skipped"]
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and not spike:
      return
    what = f"step {step}: loss {loss}, gradient norm {norm}"
    what += (
      f"; the losses before allow {border:.4f} (spike_size={self.config.spike_size})"
      if spike
      else ""
    )
    if values["skipped"]:
      what += f"; its update was left out, {self.skipped:.0f} so far"
    if (self.config.spike if finite else self.config.nonfinite) != "stop":
      print_status(what)
      return
    place = save_step(self.folder.bad_steps, step, values, batch, rows)
    again = f"jaxlm replay {self.folder.path} --step {step}"
    what += f"; nothing is saved after it. Its batch is in {place}; what went wrong: {again}"
    _log.warning(what)
    raise FloatingPointError(what)

  def _border(self, step: int) -> float:
    """Median + spike_size median absolute deviations of the losses up to two steps before: the last ones read."""
    known = [
      loss
      for at, loss in self.losses.items()
      if step - 1 - WINDOW <= at < step - 1 and math.isfinite(loss)
    ]
    if len(known) < FEWEST:
      return math.inf
    middle = statistics.median(known)
    deviation = statistics.median(abs(loss - middle) for loss in known)
    return middle + self.config.spike_size * max(deviation, LEAST_DEVIATION * abs(middle))


def save_step(
  folder: Path, step: int, values: Mapping[str, float], batch: Batch, rows: slice
) -> Path:
  """Writes the batch of a step and its numbers into `folder`/STEP; of several processes, each its own rows."""
  place = folder / f"{step:08d}"
  place.mkdir(parents=True, exist_ok=True)
  arrays = {name: array for name, array in batch._asdict().items() if array is not None}
  np.savez(place / f"rows_{rows.start}_{rows.stop}.npz", **arrays)
  if is_main():
    write_text(place / "step.json", json.dumps({"step": step, **values}) + "\n")
  return place


def load_batch(folder: Path, step: int) -> Batch | None:
  """The whole batch that `save_step` wrote, or None; ValueError where some of its rows are missing."""
  parts = sorted(
    (folder / f"{step:08d}").glob("rows_*_*.npz"), key=lambda path: int(path.stem.split("_")[1])
  )
  if not parts:
    return None
  rows = [tuple(map(int, path.stem.split("_")[1:])) for path in parts]
  for (start, _), end in zip(rows, [0, *(stop for _, stop in rows)]):
    if start != end:
      raise ValueError(f"{parts[0].parent}: rows {end} to {start} of the batch are missing")
  loaded = [np.load(path, allow_pickle=False) for path in parts]
  return Batch(
    **{name: np.concatenate([part[name] for part in loaded]) for name in loaded[0].files}
  )
