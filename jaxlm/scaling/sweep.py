"""Sweeps over hyperparameters: trains a grid of small runs, a table row for each.

In one process runs of one shape are trained together under vmap (`jaxlm.run.together`), so that one
compilation and one reading of the text serve all of them. An executor, such as submitit's for
Slurm, makes each run a job of its own.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import DataConfig, MeshConfig, TrainConfig, check
from jaxlm.data.loader import TextData, load_text
from jaxlm.run.environment import environment, hardware
from jaxlm.run.memory import keep_freed_memory_on_cpu
from jaxlm.run.resolve import with_initial_model, with_vocabulary
from jaxlm.run.text import TextTask
from jaxlm.run.together import Outcome, Together
from jaxlm.scaling.flops import parameter_count, train_flops_per_token
from jaxlm.scaling.grid import Grid, GridRun, combinations
from jaxlm.train.schedule import check_schedule
from jaxlm.train.task import Task
from sharding import make_mesh

_log = logging.getLogger("jaxlm")
Row = dict[str, Any]
_NAMES = ("config", "commit", "versions")
"""columns that are text even where all of it are digits, as in the digest 73125e0446910023"""
MakeTask = Callable[..., tuple[TrainConfig, Task]]
"""Returns of a configuration (and values by name) what the data decides filled in, and the task."""


class Job(Protocol):
  """Is what an executor returns for a function that it runs somewhere."""

  def done(self) -> bool: ...

  def result(self) -> Any: ...


class Executor(Protocol):
  """Runs functions elsewhere: `submitit.AutoExecutor`, one of `concurrent.futures`, or another."""

  def submit(self, fn: Any, /, *arguments: Any) -> Job: ...


def sweep(
  config: TrainConfig,
  grid: Grid,
  table: str | Path,
  *,
  make_task: MakeTask | None = None,
  together: bool = True,
  executor: Executor | None = None,
) -> list[Row]:
  """Trains every combination of the grid's values; returns one row per run, in the grid's order.

  `grid` maps fields to values: {"optimizer.learning_rate": [1e-3, 3e-3], "model.D": [32, 64]}; a
  sequence lists the runs themselves, each a mapping of fields to one value. Runs that differ in
  learning rate, weight decay, steps and seed alone are one program, under vmap (on CPU, where a
  step under vmap gains nothing, those of equal steps); with `together` False, and where shapes
  differ, runs follow one after another. Either way each row is added to the CSV file `table` when
  its run ends, and a run whose row is there is not run again. A run whose loss or gradient is not
  finite has the status "diverged" and costs its own row only; with `nonfinite="skip"` it goes on
  without those updates, as in `fit`. A run's numbers are those of `fit` up to rounding, which
  differs where products of several runs are one batched product; training at a rate that is barely
  stable amplifies it.

  With an `executor` each run is a job. A job that fails or is cancelled has no row, is named in the
  log, and is run by the next call. Rows of finished jobs also lie in a folder beside the table, so
  that those of jobs which outlive this process are not run again.

  `make_task(config)` returns (configuration with what the data decides filled in, task), and takes
  the values of fields "task.NAME" by name; by default the task is text, each text read once. Each
  run uses one device and writes no checkpoints. Raises UserError before anything runs for a field
  or value that does not fit, and for what a sweep cannot do.
  """
  runs = [GridRun.of(config, values) for values in combinations(grid)]
  for run in runs:
    _check(run.config)
  done = {row["config"]: row for row in read_table(Path(table))}
  outlived = {row["config"]: row for row in _rows_of_jobs(Path(table))}
  if not outlived.keys() <= done.keys():
    done = outlived | done
    write_table(Path(table), list(done.values()))
  waiting = [run for run in runs if run.digest not in done]
  if executor is None:
    rows = _train_here(waiting, make_task or text_tasks(), together)
  else:
    rows = _train_in_jobs(waiting, make_task, executor, Path(table))
  for row in rows:
    done[row["config"]] = row
    write_table(Path(table), list(done.values()))
  written = {row["config"]: row for row in read_table(Path(table))}
  return [written[run.digest] for run in runs if run.digest in written]


def _train_here(runs: Sequence[GridRun], make_task: MakeTask, together: bool) -> Iterator[Row]:
  """Yields the row of each run when it ends, trained on this process's first device."""
  if any(run.config.keep_freed_memory for run in runs):
    keep_freed_memory_on_cpu()
  programs: dict[str, Together] = {}
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    for group in _group(runs, together):
      first = group[0]
      if first.shape not in programs:
        make = functools.partial(make_task, **first.task_values)
        programs[first.shape] = Together(first.config, make)
      program = programs[first.shape]
      for outcome in program.train([run.config for run in group]):
        yield _row(group[outcome.index], program, outcome)


def _train_in_jobs(
  runs: Sequence[GridRun], make_task: MakeTask | None, executor: Executor, table: Path
) -> Iterator[Row]:
  """Yields the row of each run whose job succeeds, and logs the others."""
  folder = _folder_of_rows(table)
  folder.mkdir(parents=True, exist_ok=True)
  jobs = [(run, executor.submit(_train_job, run, make_task, folder.resolve())) for run in runs]
  while jobs:
    ended = [(run, job) for run, job in jobs if job.done()]
    jobs = [pair for pair in jobs if pair not in ended]
    for run, job in ended:
      try:
        yield job.result()
      except Exception as error:  # whatever ended the job, the other runs go on
        lines = str(error).strip().splitlines() or [""]
        _log.warning("sweep: lost %s: %s: %s", run.values, type(error).__name__, lines[-1])
    time.sleep(0 if ended else 0.5)


def _train_job(run: GridRun, make_task: MakeTask | None, folder: Path) -> Row:
  """Trains one run, writes its row into the folder, and returns it."""
  (row,) = _train_here([run], make_task or text_tasks(), together=False)
  write_text(folder / f"{run.digest}.json", json.dumps(row))
  return row


def _folder_of_rows(table: Path) -> Path:
  return table.with_name(f"{table.stem}_rows")


def _rows_of_jobs(table: Path) -> Iterator[Row]:
  """Yields the rows that jobs of former calls have left beside the table."""
  for path in sorted(_folder_of_rows(table).glob("*.json")):
    yield json.loads(path.read_text())


def text_tasks() -> MakeTask:
  """Returns a function that makes text tasks of configurations and reads each text once."""

  @functools.cache
  def read(config: DataConfig) -> TextData:
    return load_text(config)

  def make(config: TrainConfig, **values: Any) -> tuple[TrainConfig, Task]:
    check(not values, "grid", ", ".join(values), "text knows no such value of a task")
    config = with_initial_model(config)
    text = read(config.data)
    config = with_vocabulary(config, text.tokenizer.vocab_size)
    return config, TextTask(config, text)

  return make


def read_table(table: Path) -> list[Row]:
  """Returns the rows of a table that `sweep` wrote, numbers parsed; [] if it is missing."""
  if not table.is_file():
    return []
  with table.open(newline="") as file:
    return [
      {name: text if name in _NAMES else _parse(text) for name, text in row.items()}
      for row in csv.DictReader(file)
    ]


def _check(config: TrainConfig) -> None:
  """Raises UserError for what a run of a sweep cannot be."""
  check_schedule(config.optimizer, config.steps)
  single = config.mesh in (MeshConfig(), MeshConfig(data=1))
  check(single, "mesh", config.mesh.describe(), "a sweep runs on one device")
  check(config.spike == "report", "spike", config.spike, "a sweep does not act on spikes")


def _group(runs: Sequence[GridRun], together: bool) -> list[list[GridRun]]:
  """Returns the runs that are trained at once, in the order of the grid."""
  if not together:
    return [[run] for run in runs]
  apart = jax.default_backend() == "cpu"  # a run that has ended would still cost its arithmetic
  groups: dict[tuple[str, int], list[GridRun]] = {}
  for run in runs:
    groups.setdefault((run.shape, apart * run.config.steps), []).append(run)
  return list(groups.values())


def _row(run: GridRun, program: Together, outcome: Outcome) -> Row:
  unit = program.task.unit
  return {
    **run.values,
    "status": "diverged" if outcome.diverged else "finished",
    "step": outcome.step,
    unit: int(outcome.count),
    "loss": outcome.loss,
    **{name: value for name, value in outcome.evaluation.items() if name != unit},
    "parameters": outcome.parameters,
    **(_cost(program.config, outcome.count) if isinstance(program.task, TextTask) else {}),
    "seconds": round(outcome.seconds, 3),
    **provenance(),
    "config": run.digest,
  }


@functools.cache
def provenance() -> Row:
  """Returns what a row says of where it comes from."""
  about = environment()
  versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("jax", "jaxlib"))
  return {"hardware": hardware(), "commit": about["commit"], "versions": versions}


def _cost(config: TrainConfig, tokens: float) -> Row:
  """Returns parameters by part, as laws count them, and exact training FLOPs of rows of text."""
  model = config.model
  parts = parameter_count(model)
  return {
    "body": parts.blocks + model.D,
    "head": model.D * model.V,
    "embedding": 0 if model.tied else parts.embedding,
    "flops": train_flops_per_token(model, config.data.length) * tokens * config.nested.passes,
  }


def write_table(table: Path, rows: Sequence[Row]) -> None:
  """Puts the table in the place of the former one in one step, so that it is always whole."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  table.parent.mkdir(parents=True, exist_ok=True)
  write_text(table, text.getvalue())


def _parse(text: str) -> Any:
  """Returns a cell as an int or float where it is one; an empty one as None."""
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text or None
