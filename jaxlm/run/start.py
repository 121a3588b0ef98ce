"""Starts a run, or goes on with one: what is checked, written and dropped before its first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm.checkpoint.folder import (
  finished_steps,
  newest_sound,
  remove_leftovers,
  set_aside_after,
)
from jaxlm.config import TrainConfig, check
from jaxlm.run.compatibility import check_compatible
from jaxlm.run.lock import only_writer
from jaxlm.run.loop import TrainResult, train_from
from jaxlm.run.memory import keep_freed_memory_on_cpu
from jaxlm.run.output import forgiving_output
from jaxlm.run.refusal import undone_unless_kept
from jaxlm.run.remote import working_copy
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.trackers import check_login, check_trackers
from jaxlm.train.schedule import check_schedule
from jaxlm.train.task import Task
from sharding.multihost import run_on_main_process

_log = logging.getLogger("jaxlm")


@forgiving_output()
def fit(config: TrainConfig, task: Task, *, resume: bool = False) -> TrainResult:
  """Trains `task` into the folder `config.run`, which must be new, or goes on there with `resume`.

  A resumed run starts from the newest checkpoint that verifies, or again at step 0 where it ended
  before its first one; `config` replaces the one in the folder. `config.model`, `data` and `init`
  belong to text (`jaxlm.run.train`); here they are written to config.json and otherwise unused.
  Raises UserError for what cannot work, before it starts; FileNotFoundError where all checkpoints
  are damaged; FloatingPointError for numbers that the configuration wants to stop at.
  """
  with working_copy(config.run, write=True, new=not resume) as path:
    return _fit(dataclasses.replace(config, run=str(path)), task, resume)


def _fit(config: TrainConfig, task: Task, resume: bool) -> TrainResult:
  check_run(config)
  folder = RunFolder(Path(config.run))
  with only_writer(folder.path):
    if not resume:
      run_on_main_process(lambda: check_login(config))
      return start_run(config, task, folder)
    before = folder.read_config()
    newest = find_newest(config, folder)
    return continue_run(config, task, folder, newest, before)


def check_run(config: TrainConfig) -> None:
  """Raises UserError for what is wrong with any run: what is missing, or does not divide.

  It is the first that asks jax for its devices.
  """
  if config.keep_freed_memory:
    keep_freed_memory_on_cpu()
  check_schedule(config.optimizer, config.steps)
  check_trackers(config)
  sizes = config.mesh.resolve(jax.device_count())
  shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
  rule = f"must be a multiple of {shards} batch shards x accumulate={config.accumulate}"
  check(config.batch % (shards * config.accumulate) == 0, "batch", config.batch, rule)


def start_run(config: TrainConfig, task: Task, folder: RunFolder) -> TrainResult:
  """Trains from the start, into a folder that must be new and whose lock is held."""

  def prepare() -> None:
    folder.create(config)
    task.save(folder.path)

  run_on_main_process(folder.check_new)
  with undone_unless_kept(folder) as keep:
    run_on_main_process(prepare)
    return train_from(config, task, folder, -1, keep)


def continue_run(
  config: TrainConfig,
  task: Task,
  folder: RunFolder,
  newest: int,
  before: TrainConfig,
  also_write: Callable[[], None] = lambda: None,
) -> TrainResult:
  """Trains from the checkpoint of step `newest`, or again from the start where it is -1.

  `before` is the configuration of the run so far. Writes the new one and what `also_write` writes.
  When the first step has ended, drops what the run writes again: records after `newest`, and
  checkpoints that are later, damaged or unfinished. An exception before that leaves the run as it
  was.
  """

  def prepare() -> None:
    folder.write_config(config)
    also_write()
    if newest < 0:
      task.save(folder.path)
      _log.warning("%s ended before its first checkpoint: it begins again at step 0", folder.path)

  def drop() -> None:
    folder.forget_after(newest)
    set_aside_after(folder.checkpoints, newest)
    remove_leftovers(folder.checkpoints)

  with undone_unless_kept(folder) as keep:

    def first_step_done() -> None:
      run_on_main_process(drop)
      keep()

    run_on_main_process(prepare)
    return train_from(config, task, folder, newest, first_step_done, before)


def find_newest(
  config: TrainConfig, folder: RunFolder, *, other_data: bool = False, counts_rows: bool = False
) -> int:
  """Returns the step of the checkpoint that a run goes on from, -1 where it ended before any.

  Changes nothing. Raises UserError where the run is done or `config` contradicts its checkpoints;
  with `other_data`, a change of the data does not; `counts_rows` as in `check_compatible`.
  """

  def newest() -> int:
    folder.read_config()
    step = newest_sound(folder.checkpoints) if finished_steps(folder.checkpoints) else -1
    check(step < config.steps, "steps", config.steps, f"the run is at step {step}; raise --steps")
    if step >= 0:
      check_compatible(folder, config, step, other_data=other_data, counts_rows=counts_rows)
    return step

  return run_on_main_process(newest)
