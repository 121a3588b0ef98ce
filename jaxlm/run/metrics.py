"""Sends the numbers of a run to metrics.jsonl, eval.jsonl, the terminal and trackers."""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Self

import jax

from jaxlm.config import TrainConfig
from jaxlm.run.memory import memory_in_use
from jaxlm.run.progress import Progress
from jaxlm.run.run_folder import RecordFile, RunFolder
from jaxlm.run.trackers import BackgroundTracker, open_trackers
from jaxlm.run.watch import Watch
from sharding.hardware import find_chip
from sharding.multihost import is_main, run_on_main_process

_log = logging.getLogger("jaxlm")


def print_status(line: str) -> None:
  """Writes a line to the log, and from the main process to the terminal."""
  if is_main():
    print(line, flush=True)
  _log.info(line)


class Reporter:
  """Writes each step's record, shows progress, and feeds the trackers; a context manager."""

  def __init__(
    self,
    config: TrainConfig,
    folder: RunFolder,
    start: int,
    watch: Watch,
    *,
    unit: str,
  ):
    self.config, self.folder, self.watch, self.unit = config, folder, watch, unit
    self.peak_flops = _peak_flops()
    self.progress = Progress(
      config.steps, start, unit, log_every=config.log_every, quiet=not is_main()
    )
    self.trackers: list[BackgroundTracker] = []
    run_on_main_process(lambda: self.trackers.extend(open_trackers(config, start)))
    self.last = time.perf_counter()

  def __enter__(self) -> Self:
    paths = (self.folder.metrics, self.folder.evals) if is_main() else (os.devnull, os.devnull)
    self.metrics_file, self.evals_file = (RecordFile(path) for path in paths)
    self.progress.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self.progress.stop()
    self.metrics_file.close()
    self.evals_file.close()
    self.watch.set_activity("trackers")
    for tracker in self.trackers:
      tracker.close()

  @property
  def lost_trackers(self) -> tuple[str, ...]:
    """Returns the names of the trackers that have not taken every step, or could not be opened."""
    if not is_main():
      return ()
    whole = [tracker.name for tracker in self.trackers if not tracker.lost]
    return tuple(name for name in self.config.trackers if name not in whole)

  def restart_clock(self) -> None:
    """Leaves what took place since the last step, such as an evaluation, out of the next one."""
    self.last = time.perf_counter()
    self.watch.restart_clock()

  def step(self, step: int, metrics: dict[str, float], *, spike: bool, flops: float) -> None:
    """Records a finished step (1-based); its seconds are those since the last one.

    `metrics` are those of `jaxlm.train.make_train_step`; `flops` the model's in this step, 0 where
    they are not known.
    """
    now = time.perf_counter()
    seconds, self.last = now - self.last, now
    waited = self.watch.pop_seconds("data")
    self.watch.step_done(seconds)
    counts = {name: int(metrics[name]) for name in (self.unit, "skipped")}
    times = {"seconds": round(seconds, 6), "data_seconds": round(waited, 6)}
    record = {"step": step, **metrics, **counts, **times, "spike": int(spike)}
    self.metrics_file.append(record)
    for tracker in self.trackers:
      tracker.log(
        {f"train/{name}": value for name, value in record.items() if name != "step"}, step
      )
    self.progress.show(
      step,
      metrics["loss"],
      metrics[self.unit] / seconds,
      self.watch.median() * (self.config.steps - step),
      f"MFU {self._mfu(flops / seconds)}",
      f"memory {memory_in_use()}",
      f"data wait {waited / seconds:.0%}",
      logged=f"lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.2f}",
    )

  def evaluation(self, step: int, values: dict[str, float]) -> None:
    """Records and prints what an evaluation after `step` found."""
    self.evals_file.append({"step": step, **values})
    for tracker in self.trackers:
      tracker.log({f"heldout/{name}": value for name, value in values.items()}, step)
    shown = (
      f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
      for name, value in values.items()
    )
    print_status(f"step {step}: {', '.join(shown)}")

  def _mfu(self, flops_per_second: float) -> str:
    """Returns the share of the chips' peak spent on the model's own FLOPs, where both are known."""
    if self.peak_flops is None or not flops_per_second:
      return "unknown"
    return f"{flops_per_second / self.peak_flops:.1%}"


def _peak_flops() -> float | None:
  """Returns dense bfloat16 FLOP/s of all devices of the mesh; None for an unknown chip."""
  chip = find_chip(jax.devices()[0].device_kind)
  devices = jax.sharding.get_mesh().size
  return None if chip is None or chip.bf16_flops is None else chip.bf16_flops * devices
