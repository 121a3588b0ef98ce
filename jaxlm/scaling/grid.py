"""Lists the runs of a grid over the fields of a configuration and the values of its task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.config import TrainConfig, check
from jaxlm.config_json import flatten, from_dict, to_dict

Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class GridRun:
  """Holds one run of a grid."""

  values: Mapping[str, Any]
  config: TrainConfig
  task_values: Mapping[str, Any]

  @classmethod
  def of(cls, config: TrainConfig, values: Mapping[str, Any]) -> GridRun:
    """Returns the run whose configuration and task have these values."""
    of_task = {k.removeprefix("task."): v for k, v in values.items() if k.startswith("task.")}
    of_config = {k: v for k, v in values.items() if not k.startswith("task.")}
    return cls(values, with_fields(config, of_config), of_task)

  @functools.cached_property
  def digest(self) -> str:
    """Returns what names its row: a digest of its configuration, the folder aside, and its task."""
    return _digest(dataclasses.replace(self.config, run=""), self.task_values)

  @functools.cached_property
  def shape(self) -> str:
    """Returns a digest that is equal for runs that one program serves."""
    optimizer = dataclasses.replace(self.config.optimizer, learning_rate=1.0, weight_decay=0.0)
    steps = self.config.optimizer.warmup + 1
    config = dataclasses.replace(self.config, run="", seed=0, steps=steps, optimizer=optimizer)
    return _digest(config, self.task_values)


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


def _digest(config: TrainConfig, task_values: Mapping[str, Any]) -> str:
  """Returns a digest of the fields that are not at their defaults.

  So rows outlive fields that a later version adds, but not a default that it changes.
  """
  fields, defaults = _flat(config), _flat(TrainConfig())
  changed = {k: value for k, value in fields.items() if k not in defaults or defaults[k] != value}
  changed |= {f"task.{name}": value for name, value in task_values.items()}
  text = json.dumps(changed, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flat(config: TrainConfig) -> dict[str, Any]:
  return flatten(json.loads(json.dumps(to_dict(config))))


def combinations(grid: Grid) -> list[Mapping[str, Any]]:
  """Returns field -> value of each run of the grid, in its order."""
  if not isinstance(grid, Mapping):
    return list(grid)
  for path, values in grid.items():
    check(len(values) > 0, f"grid[{path!r}]", values, "must list at least one value")
  return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
