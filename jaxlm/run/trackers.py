"""Sends metrics to TensorBoard and to Weights & Biases, also across stops and resumes of a run."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.config_json import to_dict
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError, import_extra

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # of the extras of the same names


class Tracker(Protocol):
  """Takes the numbers of a step; steps ascend, and those after a resume replace older ones."""

  def log(self, values: dict[str, float], step: int) -> None:
    """Records the numbers of a step."""

  def close(self) -> None:
    """Writes what is left."""


def check_trackers(config: TrainConfig) -> None:
  """Raises MissingExtraError where the package of a configured tracker is not installed."""
  for name in config.trackers:
    _import(name)


def open_trackers(config: TrainConfig, start: int) -> list[Tracker]:
  """Returns the configured trackers of a run that goes on after step `start` (0: begins)."""
  kinds: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
  }
  return [kinds[name](config, start) for name in config.trackers]


def _import(name: str) -> Any:
  return import_extra(_MODULES[name], name, f"trackers={name}:")


class TensorBoard:
  """Writes event files into the run folder, by tensorboardX.

  The first event of each start tells TensorBoard to drop what earlier files hold after `start`.
  """

  def __init__(self, config: TrainConfig, start: int):
    self._writer = _import("tensorboard").SummaryWriter(
      str(Path(config.run) / "tensorboard"),
      purge_step=start + 1,
      filename_suffix=f".after_step_{start}",  # starts within one second write different files
    )

  def log(self, values: dict[str, float], step: int) -> None:
    """Adds a scalar for each value."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Writes what is buffered, and closes the file."""
    self._writer.close()


class WeightsAndBiases:
  """Logs to one run of the project `jaxlm`, by wandb, whose environment variables name the account.

  The id of that run is kept in the run folder. Where it already holds steps after `start`, it is
  rewound to `start` (wandb's `resume_from`).
  """

  def __init__(self, config: TrainConfig, start: int):
    wandb = _import("wandb")
    run_id = _saved_id(RunFolder(Path(config.run)))
    options: dict[str, Any] = {
      "project": "jaxlm",
      "name": Path(config.run).name,
      "dir": config.run,
      "config": to_dict(config),
    }
    try:
      self._run = wandb.init(id=run_id, resume="allow", **options)
      if self._run.step > start + 1:  # the step that wandb expects next
        self._run.finish()
        self._run = wandb.init(resume_from=f"{run_id}?_step={start}", **options)
    except wandb.errors.Error as error:  # no account, no network, a server that cannot rewind
      raise UserError(f"trackers=wandb: {error}") from error

  def log(self, values: dict[str, float], step: int) -> None:
    """Sends the values of a step."""
    self._run.log(values, step=step)

  def close(self) -> None:
    """Sends what is left, and ends the run there."""
    self._run.finish()


def _saved_id(folder: RunFolder) -> str:
  """Returns the id of the folder's run at Weights & Biases, a new one if it has none."""
  if folder.trackers.is_file():
    return json.loads(folder.trackers.read_text())["wandb"]
  run_id = uuid.uuid4().hex[:12]
  write_text(folder.trackers, json.dumps({"wandb": run_id}) + "\n")
  return run_id
