"""Where numbers go: metrics.jsonl, the terminal, and trackers."""

from __future__ import annotations

import datetime
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxlm.config import TrainConfig
from jaxlm.config_json import to_dict
from jaxlm.run.memory import memory_in_use
from jaxlm.run.run_folder import RecordFile, RunFolder
from jaxlm.run.watch import Watch
from sharding.hardware import find_chip
from sharding.multihost import is_main

_log = logging.getLogger("jaxlm")


def print_status(line: str) -> None:
  """To the log, and from the main process to the terminal."""
  if is_main():
    print(line, flush=True)
  _log.info(line)


class Tracker(Protocol):
  def __init__(self, config: TrainConfig): ...

  def log(self, values: dict[str, float], step: int) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """Event files in the run folder, through tensorboardX (extra `tensorboard`)."""

  def __init__(self, config: TrainConfig):
    from tensorboardX import SummaryWriter

    self.writer = SummaryWriter(str(Path(config.run) / "tensorboard"))

  def log(self, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
      self.writer.add_scalar(name, value, step)

  def close(self) -> None:
    self.writer.close()


class WeightsAndBiases:
  """A run of the project `jaxlm`, through wandb (extra `wandb`); wandb's environment variables choose the account."""

  def __init__(self, config: TrainConfig):
    import wandb

    name = Path(config.run).name
    self.run = wandb.init(
      project="jaxlm", name=name, dir=config.run, config=to_dict(config), resume="allow"
    )

  def log(self, values: dict[str, float], step: int) -> None:
    self.run.log(values, step=step)

  def close(self) -> None:
    self.run.finish()


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
    self.console = Console(highlight=False, quiet=not is_main())
    self.live = self.console.is_terminal
    columns = (
      "step {task.completed}/{task.total}",
      BarColumn(None),
      TextColumn("{task.fields[line]}"),
    )
    self.progress = Progress(*columns, console=self.console, disable=not self.live)
    self.task = self.progress.add_task(
      "train", total=config.steps, completed=start, line="compiling"
    )
    kinds: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    self.trackers = [kinds[name](config) for name in config.trackers if is_main()]
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
    for tracker in self.trackers:
      tracker.close()

  def restart_clock(self) -> None:
    """What took place since the last step, an evaluation say, is not part of the next one."""
    self.last = time.perf_counter()
    self.watch.restart_clock()

  def step(self, step: int, metrics: dict[str, float], *, spike: bool, flops: float) -> None:
    """Records a finished step (1-based); its seconds are those since the last one.

    `metrics` are those of `jaxlm.train.make_train_step`; `flops` the model's in this step, 0 where
    they are not known.
    """
    now = time.perf_counter()
    seconds, self.last = now - self.last, now
    waited = self.watch.spent("data")
    self.watch.step_done(seconds)
    counts = {name: int(metrics[name]) for name in (self.unit, "skipped")}
    times = {"seconds": round(seconds, 6), "data_seconds": round(waited, 6)}
    record = {"step": step, **metrics, **counts, **times, "spike": int(spike)}
    self.metrics_file.append(record)
    for tracker in self.trackers:
      tracker.log(
        {f"train/{name}": value for name, value in record.items() if name != "step"}, step
      )
    left = str(datetime.timedelta(seconds=round(self.watch.median() * (self.config.steps - step))))
    line = f"loss {metrics['loss']:.4f}  {metrics[self.unit] / seconds:,.0f} {self.unit}/s"
    line += f"  MFU {self._mfu(flops / seconds)}  {left} left"
    line += f"  memory {memory_in_use()}  data wait {waited / seconds:.0%}"
    self.progress.update(self.task, completed=step, line=line)
    if not self.live and (step % self.config.log_every == 0 or step == self.config.steps):
      line += f"  lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.2f}"
      self.console.print(f"step {step}/{self.config.steps}  {line}", soft_wrap=True)

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
