"""Where numbers go: metrics.jsonl, the terminal, and trackers."""

from __future__ import annotations

import datetime
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxlm.config import TrainConfig
from jaxlm.config_json import to_dict
from jaxlm.run.memory import memory_in_use
from jaxlm.run.run_folder import RecordFile, RunFolder
from jaxlm.run.watch import Watch
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
    peak_flops: float | None,
    flops_per_token: float,
  ):
    self.config, self.folder, self.watch = config, folder, watch
    self.peak_flops, self.flops_per_token = peak_flops, flops_per_token
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

  def step(
    self,
    step: int,
    loss: float,
    tokens: float,
    learning_rate: float,
    grad_norm: float,
    skipped: float,
    spike: bool,
  ) -> None:
    """Records a finished step (1-based); its seconds are those since the last one."""
    now = time.perf_counter()
    seconds, self.last = now - self.last, now
    waited = self.watch.spent("data")
    self.watch.step_done(seconds)
    record = {"step": step, "loss": loss, "tokens": int(tokens), "seconds": round(seconds, 6)}
    record |= {
      "learning_rate": learning_rate,
      "grad_norm": grad_norm,
      "data_seconds": round(waited, 6),
    }
    record |= {"skipped": int(skipped), "spike": int(spike)}
    self.metrics_file.append(record)
    for tracker in self.trackers:
      tracker.log(
        {f"train/{name}": value for name, value in record.items() if name != "step"}, step
      )
    left = str(datetime.timedelta(seconds=round(self.watch.median() * (self.config.steps - step))))
    line = f"loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s  MFU {self._mfu(tokens / seconds)}  {left} left"
    line += f"  memory {memory_in_use()}  data wait {waited / seconds:.0%}"
    self.progress.update(self.task, completed=step, line=line)
    if not self.live and (step % self.config.log_every == 0 or step == self.config.steps):
      self.console.print(
        f"step {step}/{self.config.steps}  {line}  lr {learning_rate:.2e}  grad {grad_norm:.2f}",
        soft_wrap=True,
      )

  def evaluation(self, step: int, loss: float, bits_per_byte: float, tokens: float) -> None:
    record = {
      "step": step,
      "heldout_loss": loss,
      "bits_per_byte": bits_per_byte,
      "tokens": int(tokens),
    }
    self.evals_file.append(record)
    for tracker in self.trackers:
      tracker.log({"heldout/loss": loss, "heldout/bits_per_byte": bits_per_byte}, step)
    print_status(
      f"step {step}: held-out loss {loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte"
    )

  def _mfu(self, tokens_per_second: float) -> str:
    """Share of the chips' peak spent on the model's own FLOPs; an unknown chip has none."""
    if self.peak_flops is None:
      return "unknown"
    return f"{tokens_per_second * self.flops_per_token / self.peak_flops:.1%}"
