"""Sweeps over hyperparameters: trains a grid of small runs in one process, a table row for each.

Runs of one shape are trained together under vmap (`jaxlm.run.together`), so that one compilation
and one reading of the text serve all of them.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import DataConfig, MeshConfig, TrainConfig, check
from jaxlm.config_json import from_dict, to_dict
from jaxlm.data.loader import TextData, load_text
from jaxlm.run.memory import keep_freed_memory_on_cpu
from jaxlm.run.resolve import with_initial_model, with_vocabulary
from jaxlm.run.text import TextTask
from jaxlm.run.together import MakeTask, Outcome, Together
from jaxlm.train.schedule import check_schedule
from jaxlm.train.task import Task
from sharding import make_mesh

Row = dict[str, Any]


def sweep(
  config: TrainConfig,
  grid: Mapping[str, Sequence[Any]],
  table: str | Path,
  *,
  make_task: MakeTask | None = None,
  together: bool = True,
) -> list[Row]:
  """Trains every combination of the grid's values; returns one row per run, in the grid's order.

  `grid` maps fields to values: {"optimizer.learning_rate": [1e-3, 3e-3], "model.D": [32, 64]}. Runs
  that differ in learning rate, weight decay, steps and seed alone are one program under vmap; with
  `together` False, and where shapes differ, runs follow one after another. Either way each row is
  added to the CSV file `table` when its run ends, and a run whose row is there is not run again. A
  run whose loss or gradient is not finite has the status "diverged" and costs its own row only;
  with `nonfinite="skip"` it goes on without those updates, as in `fit`. A run's numbers are those
  of `fit` up to rounding, which differs where products of several runs are one batched product;
  training at a rate that is barely stable amplifies it.

  `make_task(config)` returns (configuration with what the data decides filled in, task); by default
  the task is text, each text read once. Uses one device and writes no checkpoints. Raises UserError
  before anything runs for a field or value that does not fit, and for what a sweep cannot do.
  """
  runs = [_Run(values, with_fields(config, values)) for values in _combinations(grid)]
  for run in runs:
    _check(run.config)
  make_task = make_task or text_tasks()
  rows = {row["config"]: row for row in read_table(Path(table))}
  waiting = [run for run in runs if run.digest not in rows]
  if config.keep_freed_memory:
    keep_freed_memory_on_cpu()
  programs: dict[str, Together] = {}
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    for group in _group(waiting, together):
      if group[0].shape not in programs:
        programs[group[0].shape] = Together(group[0].config, make_task)
      program = programs[group[0].shape]
      for outcome in program.train([run.config for run in group]):
        run = group[outcome.index]
        rows[run.digest] = _row(run, program.task, outcome)
        _write_table(Path(table), list(rows.values()))
  written = {row["config"]: row for row in read_table(Path(table))}
  return [written[run.digest] for run in runs]


def text_tasks() -> MakeTask:
  """Returns a function that makes text tasks of configurations and reads each text once."""

  @functools.cache
  def read(config: DataConfig) -> TextData:
    return load_text(config)

  def make(config: TrainConfig) -> tuple[TrainConfig, Task]:
    config = with_initial_model(config)
    text = read(config.data)
    config = with_vocabulary(config, text.tokenizer.vocab_size)
    return config, TextTask(config, text)

  return make


def with_fields(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
  """Returns the configuration with fields replaced by path: "optimizer.learning_rate", "model.D".

  Raises UserError for a field that does not exist and for a value that does not fit it.
  """
  tree = json.loads(json.dumps(to_dict(config)))
  for path, value in values.items():
    group = tree
    *parents, name = path.split(".")
    for parent in parents:
      if isinstance(group, list):
        group = dict(zip(map(str, range(len(group))), group))
      check(isinstance(group, dict) and parent in group, path, value, "there is no such field")
      group = group[parent]
    check(isinstance(group, dict) and name in group, path, value, "there is no such field")
    group[name] = value
  return from_dict(TrainConfig, tree)


def read_table(table: Path) -> list[Row]:
  """Returns the rows of a table that `sweep` wrote, numbers parsed; [] if it is missing."""
  if not table.is_file():
    return []
  with table.open(newline="") as file:
    return [{name: _parse(text) for name, text in row.items()} for row in csv.DictReader(file)]


@dataclasses.dataclass(frozen=True)
class _Run:
  """One point of the grid."""

  values: Mapping[str, Any]
  config: TrainConfig

  @functools.cached_property
  def digest(self) -> str:
    """Identifies the run's row: all of its configuration but the folder."""
    return _digest(dataclasses.replace(self.config, run=""))

  @functools.cached_property
  def shape(self) -> str:
    """Is equal for runs that one program serves."""
    optimizer = dataclasses.replace(self.config.optimizer, learning_rate=1.0, weight_decay=0.0)
    steps = self.config.optimizer.warmup + 1
    return _digest(
      dataclasses.replace(self.config, run="", seed=0, steps=steps, optimizer=optimizer)
    )


def _digest(config: TrainConfig) -> str:
  text = json.dumps(to_dict(config), sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  for path, values in grid.items():
    check(len(values) > 0, f"grid[{path!r}]", values, "must list at least one value")
  return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _check(config: TrainConfig) -> None:
  """Raises UserError for what a run of a sweep cannot be."""
  check_schedule(config.optimizer, config.steps)
  single = config.mesh in (MeshConfig(), MeshConfig(data=1))
  check(single, "mesh", config.mesh.describe(), "a sweep runs on one device")
  check(config.spike == "report", "spike", config.spike, "a sweep does not act on spikes")


def _group(runs: Sequence[_Run], together: bool) -> list[list[_Run]]:
  """Returns the runs that are trained at once, in the order of the grid."""
  if not together:
    return [[run] for run in runs]
  groups: dict[str, list[_Run]] = {}
  for run in runs:
    groups.setdefault(run.shape, []).append(run)
  return list(groups.values())


def _row(run: _Run, task: Task, outcome: Outcome) -> Row:
  return {
    **run.values,
    "status": "diverged" if outcome.diverged else "finished",
    "step": outcome.step,
    task.unit: int(outcome.count),
    "loss": outcome.loss,
    **{name: value for name, value in outcome.evaluation.items() if name != task.unit},
    "parameters": outcome.parameters,
    "seconds": round(outcome.seconds, 3),
    "device": jax.devices()[0].device_kind,
    "config": run.digest,
  }


def _write_table(table: Path, rows: Sequence[Row]) -> None:
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
