"""The whole run in one function: mesh, data, state, step, evaluation, loop."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.checkpoint import Checkpoints, restore
from jaxlm.checkpoint.folder import (
  checkpoint_path,
  finished_steps,
  newest_sound,
  remove_leftovers,
  set_aside_after,
)
from jaxlm.config import TrainConfig, check
from jaxlm.data.baselines import baselines
from jaxlm.data.loader import Batch, TextData, heldout_batches, load_text, train_loader
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop import huggingface
from jaxlm.run.environment import check_fits, record_start
from jaxlm.run.guard import Guard
from jaxlm.run.interrupt import StopRequest
from jaxlm.run.lock import only_writer
from jaxlm.run.memory import keep_freed_memory
from jaxlm.run.metrics import Reporter, print_status
from jaxlm.run.plot import draw_loss
from jaxlm.run.resolve import check_mesh, with_initial_model, with_vocabulary
from jaxlm.run.run_folder import RunFolder, log_to
from jaxlm.run.watch import Watch
from jaxlm.scaling.flops import parameter_count, train_flops_per_token
from jaxlm.train.evaluate import make_evaluator
from jaxlm.train.optimizer import learning_rate_schedule
from jaxlm.train.step import Metrics, TrainState, init_state, make_train_step
from sharding import make_mesh
from sharding.batches import globalize, local_rows
from sharding.hardware import find_chip
from sharding.multihost import is_main, run_on_main_process
from sharding.rules import mesh_shape

_log = logging.getLogger("jaxlm")


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a run ends with; losses in nats per token."""

  config: TrainConfig
  params: Any
  """the weights, or their moving average where the run keeps one"""
  step: int
  loss: float
  heldout_loss: float | None
  bits_per_byte: float | None
  finished: bool
  """False when it was asked to stop before the last step"""
  saved: int
  """step of the newest checkpoint, -1 for none; below `step` where the last one could not be written"""


def train(config: TrainConfig) -> TrainResult:
  """Trains from scratch or from `config.init` into the new folder `config.run`.

  Raises ValueError for what cannot work, before it starts.
  """
  check(bool(config.run), "run", config.run, "names the folder of the run")
  folder = RunFolder(Path(config.run))
  config = with_initial_model(config)
  check_mesh(config)
  learning_rate_schedule(
    config.optimizer, config.steps
  )  # refuses a warm-up that the run is too short for
  text = load_text(config.data)
  config = with_vocabulary(config, text.tokenizer.vocab_size)

  def start() -> int:
    folder.create(config)
    text.tokenizer.save(folder.path)
    return 0

  with only_writer(folder.path):
    run_on_main_process(start)
    return _run(config, folder, text, resume_from=None)


def resume(run: str | Path, steps: int | None = None) -> TrainResult:
  """Goes on from the newest checkpoint that verifies, or begins again where the run had none when it ended.

  `steps` replaces the configured number of steps. Raises FileNotFoundError where there are checkpoints, all damaged.
  """
  folder = RunFolder(Path(run))
  config = dataclasses.replace(folder.read_config(), run=str(folder.path))
  if steps is not None:
    config = dataclasses.replace(config, steps=steps)
  check_mesh(config)
  with only_writer(folder.path):
    # -1: killed before its first checkpoint was finished
    newest = run_on_main_process(
      lambda: newest_sound(folder.checkpoints) if finished_steps(folder.checkpoints) else -1
    )
    check(
      newest < config.steps, "steps", config.steps, f"the run is at step {newest}; raise --steps"
    )
    if newest >= 0:
      check_fits(folder, config)
    tokenizer = load_tokenizer(folder.path, config.data, config.model.V) if newest >= 0 else None
    text = load_text(config.data, tokenizer)
    if is_main():
      folder.write_config(config)
      folder.forget_after(newest)
      set_aside_after(folder.checkpoints, newest)
      remove_leftovers(folder.checkpoints)
      if newest < 0:
        _log.warning("%s ended before its first checkpoint: it begins again at step 0", folder.path)
        text.tokenizer.save(folder.path)
    return _run(
      config, folder, text, None if newest < 0 else checkpoint_path(folder.checkpoints, newest)
    )


def _run(
  config: TrainConfig, folder: RunFolder, text: TextData, resume_from: Path | None
) -> TrainResult:
  if config.keep_freed_memory and jax.default_backend() == "cpu":
    keep_freed_memory()
  with (
    log_to(folder.log if is_main() else None),
    StopRequest(config.stop_seconds) as stop,
    Watch(print_status) as watch,
    jax.set_mesh(make_mesh(config.mesh)),
  ):
    return _loop(config, folder, text, resume_from, stop, watch)


def begin(config: TrainConfig, text: TextData, resume_from: Path | None) -> tuple[TrainState, Any]:
  """(state, iterator over this process's rows of each batch), from a checkpoint or from the start."""
  # data: the order depends on the seed alone; the iterator's position is part of every checkpoint
  batches = train_loader(text, batch=config.batch, seed=config.seed, rows=local_rows(config.batch))
  # state: from the checkpoint, from other weights, or born sharded
  if resume_from is None:
    params = huggingface.load(config.init, dtype="float32")[1] if config.init else None
    return jax.jit(init_state, static_argnums=0, donate_argnums=1)(config, params), batches
  state, position = restore(resume_from, jax.eval_shape(lambda: init_state(config)))
  batches.set_state(position)
  return state, batches


def _loop(
  config: TrainConfig,
  folder: RunFolder,
  text: TextData,
  resume_from: Path | None,
  stop: StopRequest,
  watch: Watch,
) -> TrainResult:
  watch.on("compile" if resume_from is None else "checkpoint")
  state, batches = begin(config, text, resume_from)
  start = int(state.step)

  # step and evaluation
  train_step = jax.jit(make_train_step(config), donate_argnums=0)
  evaluate = make_evaluator(config)
  saved = -1 if resume_from is None else start
  checkpoints = Checkpoints(
    folder.checkpoints, keep=config.keep, keep_every=config.keep_every, saved=saved
  )

  step, loss, heldout, waiting = start, float("nan"), (None, None), None
  flops = train_flops_per_token(config.model, config.data.length)
  reporter = Reporter(config, folder, start, watch, peak_flops=_peak_flops(), flops_per_token=flops)
  guard = Guard(config, folder, start)
  with reporter as report, checkpoints:
    print_status(_headline(config, text, folder, start))
    if is_main() and (changes := record_start(folder, start, config)):
      print_status(f"differs from the start before: {'; '.join(changes)}")
    while step < config.steps and not stop.reached(step + 1):
      watch.on("data")
      batch = next(batches)
      watch.on("compile" if step == start else "device")
      state, metrics = train_step(state, globalize(batch, config.batch), guard.limit(step + 1))
      step += 1
      if waiting is not None:  # read step n - 1 while the device works on step n
        loss = _report(report, guard, *waiting)
      waiting = step, metrics, batch
      saving, evaluating = (
        _due(step, every, config.steps) for every in (config.save_every, config.eval_every)
      )
      if not (saving or evaluating):
        continue
      loss, waiting = _report(report, guard, *waiting), None
      if evaluating:
        watch.on("evaluation")
        heldout = _evaluate(config, text, evaluate, state, report, step)
      watch.on("checkpoint")
      if saving:  # last, so that a run resumed from here lacks no record of what came before
        checkpoints.save(state, batches.get_state())
      report.restart_clock()
    if waiting is not None:
      loss = _report(report, guard, *waiting)
    watch.on("checkpoint")
    if run_on_main_process(checkpoints.wait) < step:  # none was due, or it failed
      checkpoints.save(state, batches.get_state())
    saved = run_on_main_process(checkpoints.wait)
    if saved < step:
      _log.error("step %d of %d is not saved, %s", step, config.steps, checkpoints.newest)
    elif step < config.steps:
      print_status(
        f"stopped and saved at step {step} of {config.steps} ({stop.reason or 'another process'})"
      )
      print_status(f"go on with: jaxlm resume {folder.path}")
    elif is_main():
      print_status(_plot(folder, text))
  params = state.params if state.ema is None else state.ema
  return TrainResult(
    config, params, step, loss, *heldout, finished=step == config.steps, saved=saved
  )


def _due(step: int, every: int, steps: int) -> bool:
  return step == steps or (every > 0 and step % every == 0)


def _report(report: Reporter, guard: Guard, step: int, metrics: Metrics, batch: Batch) -> float:
  """Waits for a step's metrics, records and judges them; returns its loss."""
  report.watch.on("device")
  values = {name: float(value) for name, value in metrics._asdict().items()}
  report.step(step, **values, spike=guard.is_spike(step, values["loss"]))
  guard.check_step(step, values, batch, local_rows(report.config.batch))
  return values["loss"]


def _evaluate(
  config: TrainConfig, text: TextData, evaluate, state: TrainState, report: Reporter, step: int
):
  params = state.params if state.ema is None else state.ema
  rows = local_rows(config.batch)
  loss, tokens = evaluate(
    params, heldout_batches(text, batch=config.batch, rows=rows, limit=config.eval_batches)
  )
  bits = text.bits_per_byte(loss)
  report.evaluation(step, loss, bits, tokens)
  return loss, bits


def _plot(folder: RunFolder, text: TextData) -> str:
  if importlib.util.find_spec("matplotlib") is None:
    return f"{folder.plot.name} is not drawn: matplotlib is missing (pip install 'jaxlm[plot]')"
  try:
    draw_loss(folder, baselines(text.corpus))
  except OSError as error:
    return f"{folder.plot.name} is not drawn: {error}"
  return f"drew {folder.plot}"


def _peak_flops() -> float | None:
  """Of all devices of the mesh, dense bfloat16; None for a chip that the table does not know."""
  chip = find_chip(jax.devices()[0].device_kind)
  devices = jax.sharding.get_mesh().size
  return None if chip is None or chip.bf16_flops is None else chip.bf16_flops * devices


def _headline(config: TrainConfig, text: TextData, folder: RunFolder, start: int) -> str:
  devices = (
    ", ".join(f"{axis} {size}" for axis, size in mesh_shape().items() if size > 1) or "1 device"
  )
  begin = f"resuming at step {start}" if start else "training"
  return (
    f"{begin}: {parameter_count(config.model).total:,} parameters, {text.report.splitlines()[-1]}\n"
    f"on {jax.devices()[0].device_kind} ({devices}), into {folder.path}"
  )
