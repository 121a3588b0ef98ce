"""Loops over the steps of a run, with evaluations, checkpoints and records, for any task."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlm.checkpoint.checkpoint import Checkpoints
from jaxlm.checkpoint.folder import checkpoint_path
from jaxlm.config import TrainConfig
from jaxlm.run.environment import record_start
from jaxlm.run.guard import Guard
from jaxlm.run.interrupt import StopRequest
from jaxlm.run.metrics import Reporter, print_status
from jaxlm.run.plot import draw_loss
from jaxlm.run.restore import restore_or_init
from jaxlm.run.run_folder import RunFolder, log_to
from jaxlm.run.watch import Watch
from jaxlm.train.schedule import describe_change
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_train_step
from jaxlm.train.task import Batches, Task
from sharding import make_mesh
from sharding.batches import globalize, local_rows
from sharding.multihost import is_main, run_on_main_process
from sharding.rules import mesh_shape

_log = logging.getLogger("jaxlm")


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """Holds what a run ends with."""

  config: TrainConfig
  params: Any
  """the weights for use: trained (their average, if one is kept) and frozen ones in one tree"""
  model_state: Any
  step: int
  metrics: dict[str, float]
  """of the last step, as in metrics.jsonl"""
  evaluation: dict[str, float]
  """the last one, as in eval.jsonl; empty where there was none"""
  finished: bool
  """False when it was asked to stop before the last step"""
  saved: int
  """step of the newest checkpoint, -1 for none; below `step` where the last could not be written"""
  lost_trackers: tuple[str, ...]
  """trackers that have not taken every step; their libraries may hold up the end of the process"""


def train_from(
  config: TrainConfig,
  task: Task,
  folder: RunFolder,
  newest: int,
  first_step_done: Callable[[], None],
  before: TrainConfig | None = None,
) -> TrainResult:
  """Trains from the checkpoint of step `newest`, or from the start where it is -1.

  Calls `first_step_done` in all processes before anything of a step is recorded or saved. `before`
  is the configuration that a resumed run has had so far.
  """
  with (
    log_to(folder.log if is_main() else None),
    StopRequest(config.stop_seconds) as stop,
    Watch(print_status) as watch,
    jax.set_mesh(make_mesh(config.mesh)),
  ):
    return _Run(config, task, folder, stop, watch, first_step_done).train(newest, before)


@dataclasses.dataclass(frozen=True)
class _Pending:
  """Holds a step that the devices may still be working on."""

  step: int
  metrics: Mapping[str, jax.Array]
  batch: Any

  def read(self) -> dict[str, float]:
    """Waits for the step and returns its metrics; those that are arrays are left out."""
    scalars = {name: value for name, value in self.metrics.items() if not value.shape}
    return {name: float(value) for name, value in jax.device_get(scalars).items()}


class _Run:
  """Trains one run under its lock, its mesh and its signal handlers."""

  def __init__(
    self,
    config: TrainConfig,
    task: Task,
    folder: RunFolder,
    stop: StopRequest,
    watch: Watch,
    first_step_done: Callable[[], None],
  ):
    self.config, self.task, self.folder, self.stop, self.watch = config, task, folder, stop, watch
    self.first_step_done: Callable[[], None] | None = first_step_done
    self.rows = local_rows(config.batch)
    self.metrics: dict[str, float] = {"loss": math.nan}
    self.evaluation: dict[str, float] = {}

  def train(self, newest: int, before: TrainConfig | None) -> TrainResult:
    """Runs the steps that are left, and returns what the run ends with."""
    config, watch = self.config, self.watch
    resume_from = None if newest < 0 else checkpoint_path(self.folder.checkpoints, newest)
    watch.set_activity("compile" if resume_from is None else "checkpoint")
    state, batches = restore_or_init(config, self.task, resume_from)
    start = step = int(state.step)
    train_step = jax.jit(make_train_step(config, self.task), donate_argnums=0)
    self.guard = Guard(config, self.folder, start)
    self.reporter = Reporter(config, self.folder, start, watch, unit=self.task.unit)
    self.checkpoints = Checkpoints(
      self.folder.checkpoints, keep=config.keep, keep_every=config.keep_every, saved=newest
    )
    pending: _Pending | None = None
    with self.reporter, self.checkpoints:
      self._print_start(state, start, before)
      while step < config.steps and not self.stop.reached(step + 1):
        watch.set_activity("data")
        batch = next(batches)
        watch.set_activity("compile" if step == start else "device")
        limit = self.guard.limit(step + 1)
        state, metrics = train_step(state, globalize(batch, config.batch), limit)
        step += 1
        self._report(pending)  # reads step n - 1 while the devices work on step n
        pending = _Pending(step, metrics, batch)
        saving = _is_due(step, config.save_every, config.steps)
        evaluating = _is_due(step, config.eval_every, config.steps)
        if not (saving or evaluating):
          continue
        self._report(pending)
        pending = None
        if evaluating:
          self._evaluate(state, step)
        watch.set_activity("checkpoint")
        if saving:  # last, so that a run resumed from here lacks no record of what came before
          self.checkpoints.save(state, batches.get_state())
        self.reporter.restart_clock()
      self._report(pending)
      saved = self._finish(state, batches, step)
    return TrainResult(
      config=config,
      params=state.weights(),
      model_state=state.model_state,
      step=step,
      metrics=self.metrics,
      evaluation=self.evaluation,
      finished=step == config.steps,
      saved=saved,
      lost_trackers=self.reporter.lost_trackers,
    )

  def _report(self, pending: _Pending | None) -> None:
    """Waits for a step's metrics, records and checks them."""
    if pending is None:
      return
    self.watch.set_activity("device")
    self.metrics = pending.read()
    if self.first_step_done is not None:
      self.task.check_first_step(jax.device_get(pending.metrics))
      self.first_step_done()
      self.first_step_done = None
    flops = self.task.flops(pending.batch) * self.config.batch / len(self.rows)
    spike = self.guard.is_spike(pending.step, self.metrics["loss"])
    self.reporter.step(pending.step, self.metrics, spike=spike, flops=flops)
    self.guard.check_step(pending.step, self.metrics, pending.batch, self.rows)

  def _evaluate(self, state: TrainState, step: int) -> None:
    self.watch.set_activity("evaluation")
    self.evaluation = self.task.evaluate(state.weights(), state.model_state, self.rows)
    if self.evaluation:
      self.reporter.evaluation(step, self.evaluation)

  def _finish(self, state: TrainState, batches: Batches, step: int) -> int:
    """Saves the last step, unless it is saved already, and says how the run ended."""
    self.watch.set_activity("checkpoint")
    if run_on_main_process(self.checkpoints.wait) < step:  # none was due, or it failed
      self.checkpoints.save(state, batches.get_state())
    saved, steps = run_on_main_process(self.checkpoints.wait), self.config.steps
    if saved < step:
      _log.error("step %d of %d is not saved, %s", step, steps, self.checkpoints.newest)
    elif step < steps:
      reason = self.stop.reason or "SIGTERM, or another process"
      print_status(f"stopped and saved at step {step} of {steps} ({reason})")
      print_status(f"resumable; go on with: jaxlm resume {self.folder.name}")
    elif is_main():
      print_status(_draw(self.folder, self.task))
    return saved

  def _print_start(self, state: TrainState, start: int, before: TrainConfig | None) -> None:
    trained, frozen = _count(state.params), _count(state.frozen)
    parameters = f"{trained:,} parameters" + (f", {frozen:,} frozen" if frozen else "")
    axes = [f"{axis} {size}" for axis, size in mesh_shape().items() if size > 1]
    devices = f"{jax.devices()[0].device_kind} ({', '.join(axes) or '1 device'})"
    verb = f"resuming at step {start}" if start else "training"
    print_status(f"{verb}: {parameters}, {self.task.describe()}")
    print_status(f"on {devices}, into {self.folder.name}")
    report = self.task.report()
    for line in report:
      print_status(f"data: {line}")
    matmuls = self.task.matmuls()
    for line in matmuls:
      print_status(f"matmuls: {line}")
    if is_main() and (changes := record_start(self.folder, start, self.config, report, matmuls)):
      print_status(f"differs from the start before: {'; '.join(changes)}")
    if before is not None and (line := describe_change(before, self.config, start)):
      print_status(line)


def _is_due(step: int, every: int, steps: int) -> bool:
  return step == steps or (every > 0 and step % every == 0)


def _count(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def _draw(folder: RunFolder, task: Task) -> str:
  """Draws loss.png where it can; returns a line that says whether it could."""
  if importlib.util.find_spec("matplotlib") is None:
    return f"{folder.plot.name} is not drawn: matplotlib is missing (pip install 'jaxlm[plot]')"
  try:
    draw_loss(folder, task.references())
  except Exception as error:  # a picture is not worth a run, whatever the library or the task raise
    _log.warning("%s is not drawn", folder.plot.name, exc_info=True)
    return f"{folder.plot.name} is not drawn: {type(error).__name__}: {error}"
  return f"drew {folder.plot}"
