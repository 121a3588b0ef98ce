"""The whole run in one function: mesh, data, state, step, evaluation, loop."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import ModelConfig, TrainConfig, check
from jaxlm.data.baselines import baselines
from jaxlm.data.loader import TextData, heldout_batches, load_text, train_loader
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop import huggingface
from jaxlm.scaling.flops import train_flops_per_token
from jaxlm.train.checkpoint import Checkpoints, checkpoint_path, newest_sound, restore, set_aside_after
from jaxlm.train.evaluate import make_evaluator
from jaxlm.train.interrupt import StopRequest
from jaxlm.train.memory import keep_freed_memory
from jaxlm.train.metrics import Reporter
from jaxlm.train.plot import draw_loss
from jaxlm.train.run_folder import RunFolder, log_to
from jaxlm.train.step import Metrics, TrainState, init_state, make_train_step
from sharding import make_mesh
from sharding.batches import globalize, local_rows
from sharding.hardware import find_chip
from sharding.multihost import decide, is_main
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


def train(config: TrainConfig) -> TrainResult:
  """Trains from scratch or from `config.init` into the new folder `config.run`.

  Raises ValueError for what cannot work, before it starts.
  """
  check(bool(config.run), "run", config.run, "names the folder of the run")
  folder = RunFolder(Path(config.run))
  config = with_initial_model(config)
  check_mesh(config)
  text = load_text(config.data)
  config = _with_vocabulary(config, text.tokenizer.vocab_size)

  def start() -> int:
    folder.create(config)
    text.tokenizer.save(folder.path)
    return 0

  decide(start)
  return _run(config, folder, text, resume_from=None)


def resume(run: str | Path, steps: int | None = None) -> TrainResult:
  """Goes on from the newest checkpoint that verifies; `steps` replaces the configured number of steps."""
  folder = RunFolder(Path(run))
  config = dataclasses.replace(folder.read_config(), run=str(folder.path))
  if steps is not None:
    config = dataclasses.replace(config, steps=steps)
  check_mesh(config)
  newest = decide(lambda: newest_sound(folder.checkpoints))
  check(newest < config.steps, "steps", config.steps, f"the run is at step {newest}; raise --steps")
  text = load_text(config.data, load_tokenizer(folder.path, config.data))
  if is_main():
    folder.write_config(config)
    folder.forget_after(newest)
    set_aside_after(folder.checkpoints, newest)
  return _run(config, folder, text, resume_from=checkpoint_path(folder.checkpoints, newest))


def _run(config: TrainConfig, folder: RunFolder, text: TextData, resume_from: Path | None) -> TrainResult:
  handler = log_to(folder.log) if is_main() else logging.NullHandler()
  if config.keep_freed_memory and jax.default_backend() == "cpu":
    keep_freed_memory()
  try:
    with jax.set_mesh(make_mesh(config.mesh)):
      return _loop(config, folder, text, resume_from)
  finally:
    logging.getLogger("jaxlm").removeHandler(handler)
    handler.close()


def _loop(config: TrainConfig, folder: RunFolder, text: TextData, resume_from: Path | None) -> TrainResult:
  # data: the order depends on the seed alone; the iterator's position is part of every checkpoint
  batches = train_loader(text, batch=config.batch, seed=config.seed, rows=local_rows(config.batch))

  # state: from the checkpoint, from other weights, or born sharded
  if resume_from is None:
    params = huggingface.load(config.init, dtype="float32")[1] if config.init else None
    state = jax.jit(init_state, static_argnums=0, donate_argnums=1)(config, params)
  else:
    state, position = restore(resume_from, jax.eval_shape(lambda: init_state(config)))
    batches.set_state(position)
  start = int(state.step)

  # step and evaluation
  train_step = jax.jit(make_train_step(config), donate_argnums=0)
  evaluate = make_evaluator(config)
  checkpoints = Checkpoints(folder.checkpoints, keep=config.keep, keep_every=config.keep_every)

  step, saved, loss, heldout, waiting = start, start, float("nan"), (None, None), None
  flops = train_flops_per_token(config.model, config.data.length)
  reporter = Reporter(config, folder, start, peak_flops=_peak_flops(), flops_per_token=flops)
  with StopRequest() as stop, reporter as report:
    report.say(_headline(config, text, folder, start))
    while step < config.steps and not stop.requested:
      state, metrics = train_step(state, globalize(next(batches), config.batch))
      step += 1
      if waiting is not None:  # read step n - 1 while the device works on step n
        loss = _report(report, step - 1, waiting)
      waiting = metrics
      saving, evaluating = (_due(step, every, config.steps) for every in (config.save_every, config.eval_every))
      if not (saving or evaluating):
        continue
      loss, waiting = _report(report, step, waiting), None
      if saving:
        checkpoints.save(state, batches.get_state())
        saved = step
      if evaluating:
        heldout = _evaluate(config, text, evaluate, state, report, step)
      report.restart_clock()
    if waiting is not None:
      loss = _report(report, step, waiting)
    if saved < step:
      checkpoints.save(state, batches.get_state())
    checkpoints.close()
    if step < config.steps:
      report.say(f"stopped and saved at step {step} of {config.steps}; go on with: jaxlm resume {folder.path}")
    elif is_main():
      report.say(_plot(folder, text))
  params = state.params if state.ema is None else state.ema
  return TrainResult(config, params, step, loss, *heldout, finished=step == config.steps)


def _due(step: int, every: int, steps: int) -> bool:
  return step == steps or (every > 0 and step % every == 0)


def _report(report: Reporter, step: int, metrics: Metrics) -> float:
  """Waits for a step's metrics and records them; returns its loss."""
  values = {name: float(value) for name, value in metrics._asdict().items()}
  report.step(step, **values)
  return values["loss"]


def _evaluate(config: TrainConfig, text: TextData, evaluate, state: TrainState, report: Reporter, step: int):
  params = state.params if state.ema is None else state.ema
  rows = local_rows(config.batch)
  loss, tokens = evaluate(params, heldout_batches(text, batch=config.batch, rows=rows, limit=config.eval_batches))
  bits = text.bits_per_byte(loss)
  report.evaluation(step, loss, bits, tokens)
  return loss, bits


def _plot(folder: RunFolder, text: TextData) -> str:
  if importlib.util.find_spec("matplotlib") is None:
    return f"{folder.plot.name} is not drawn: matplotlib is missing (pip install 'jaxlm[plot]')"
  draw_loss(folder, baselines(text.corpus))
  return f"drew {folder.plot}"


def _with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
  if config.model.V >= vocab_size:
    return config
  rule = f"has {vocab_size} ids, more than the V={config.model.V} of init={config.init!r}"
  check(not config.init, "data.tokenizer", config.data.tokenizer, rule)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, V=vocab_size))


def with_initial_model(config: TrainConfig) -> TrainConfig:
  """With the model of the checkpoint that training starts from, and its tokenizer in place of `bytes`, if it has one.

  How to compute (dtype, attention_implementation, remat, scan) stays as configured. ValueError as `huggingface.load`.
  """
  if not config.init:
    return config
  folder = huggingface.local_folder(config.init)
  model, _, _ = huggingface.inspect(folder, "float32")
  computing = {name: getattr(config.model, name) for name in ("dtype", "attention_implementation", "remat", "scan")}
  data = config.data
  if data.tokenizer == "bytes" and (folder / TOKENIZER_FILE).is_file():
    data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER_FILE))
  return dataclasses.replace(config, model=dataclasses.replace(model, **computing), data=data)


def check_mesh(config: TrainConfig) -> None:
  """ValueError where the batch or the model does not divide over the mesh, or the model cannot use one of its axes."""
  sizes = config.mesh.resolve(jax.device_count())
  for axis in ("stage", "context_ring", "context_ulysses", "expert"):
    check(sizes[axis] == 1, f"mesh.{axis}", sizes[axis], "the model does not use this axis; it must be 1")
  shards, model, tensor = sizes["data"] * sizes["fsdp"], config.model, sizes["tensor"]
  rule = f"must be a multiple of {shards} batch shards x accumulate={config.accumulate}"
  check(config.batch % (shards * config.accumulate) == 0, "batch", config.batch, rule)
  check(config.data.length % tensor == 0, "data.length", config.data.length, f"must be a multiple of {tensor=}")
  check(model.D % sizes["fsdp"] == 0, "model.D", model.D, f"must be a multiple of mesh.fsdp={sizes['fsdp']}")
  for name in ("N", "K", "F", "V"):
    size = getattr(model, name)
    check(size % tensor == 0, f"model.{name}", size, f"must be a multiple of mesh.tensor={tensor}")


def _peak_flops() -> float | None:
  """Of all devices of the mesh, dense bfloat16; None for a chip that the table does not know."""
  chip = find_chip(jax.devices()[0].device_kind)
  devices = jax.sharding.get_mesh().size
  return None if chip is None or chip.bf16_flops is None else chip.bf16_flops * devices


def _headline(config: TrainConfig, text: TextData, folder: RunFolder, start: int) -> str:
  devices = ", ".join(f"{axis} {size}" for axis, size in mesh_shape().items() if size > 1) or "1 device"
  begin = f"resuming at step {start}" if start else "training"
  return (
    f"{begin}: {parameters(config.model):,} parameters, {text.report.splitlines()[-1]}\n"
    f"on {jax.devices()[0].device_kind} ({devices}), into {folder.path}"
  )


def parameters(config: ModelConfig) -> int:
  from jaxlm.scaling.flops import parameter_count

  return parameter_count(config).total
