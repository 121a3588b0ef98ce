"""Sends metrics to TensorBoard and to Weights & Biases, also across stops and resumes of a run."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.config_json import to_dict
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError, import_extra

_log = logging.getLogger("jaxlm")
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


def check_login(config: TrainConfig) -> None:
  """Raises UserError where Weights & Biases is configured and no account of it is known here."""
  if "wandb" in config.trackers:
    wandb = _import("wandb")
    try:
      wandb.login(verify=False)  # asks nobody over the network
    except wandb.errors.UsageError as error:
      raise UserError(f"trackers=wandb: {error}") from error


def open_trackers(config: TrainConfig, start: int) -> list[BackgroundTracker]:
  """Returns the configured trackers of a run that goes on after step `start` (0: begins).

  One that cannot be opened is reported and left out, because a run that was stopped has to go on.
  Raises UserError where a new run's tracker asks for what the user has to mend, such as a login.
  """
  kinds: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
  }
  trackers = []
  for name in config.trackers:
    try:
      trackers.append(BackgroundTracker(name, kinds[name](config, start)))
    except Exception as error:
      if isinstance(error, UserError) and start == 0:
        raise
      _log_lost(name, start, error)
  return trackers


def _log_lost(name: str, step: int, error: BaseException) -> None:
  """Logs that a tracker takes nothing from `step` on, and why."""
  _log.error(
    "trackers=%s: lost after step %d (%s: %s); training goes on, metrics.jsonl has every step",
    name,
    step,
    type(error).__name__,
    error,
  )


class BackgroundTracker:
  """Feeds a tracker from a thread of its own, so that it can neither end nor hold up a run.

  A tracker that raises, or that stops taking numbers, is reported once and left alone. Its thread
  does not keep the process from ending.
  """

  LARGEST_BACKLOG = 4096  # steps
  PATIENCE = 30.0  # seconds that `close` waits for what has not been sent

  def __init__(self, name: str, tracker: Tracker):
    self.name, self.tracker = name, tracker
    self.lost = False
    self._step = 0
    self._backlog = queue.Queue[tuple[dict[str, float], int] | None](self.LARGEST_BACKLOG)
    self._thread = threading.Thread(target=self._feed, daemon=True, name=f"tracker {name}")
    self._thread.start()

  def log(self, values: dict[str, float], step: int) -> None:
    """Hands on the numbers of a step, and returns at once."""
    if not self.lost:
      self._step = step
      self._put((values, step))

  def close(self) -> None:
    """Waits until the tracker has taken everything and is closed, or for `PATIENCE` seconds."""
    if not self.lost:
      self._put(None)
      self._thread.join(self.PATIENCE)
      if self._thread.is_alive():
        self._lose(TimeoutError(f"does not finish within {self.PATIENCE:.0f} s"))

  def _put(self, item: tuple[dict[str, float], int] | None) -> None:
    try:
      self._backlog.put_nowait(item)
    except queue.Full:
      self._lose(TimeoutError(f"is {self.LARGEST_BACKLOG} steps behind"))

  def _feed(self) -> None:
    try:
      while (item := self._backlog.get()) is not None:
        self.tracker.log(*item)
      self.tracker.close()
    except (Exception, SystemExit) as error:
      self._lose(error)

  def _lose(self, error: BaseException) -> None:
    if not self.lost:
      self.lost = True
      _log_lost(self.name, self._step, error)


def _import(name: str) -> Any:
  return import_extra(_MODULES[name], name, f"trackers={name}:")


class TensorBoard:
  """Writes an event file into the run folder, by tensorboardX, without its threads and processes.

  The first event tells TensorBoard to drop what earlier files hold after `start`.
  """

  FLUSH_EVERY = 30.0  # seconds

  def __init__(self, config: TrainConfig, start: int):
    _import("tensorboard")
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = Path(config.run) / "tensorboard"
    folder.mkdir(exist_ok=True)
    # starts within one second write different files
    self._writer = EventsWriter(str(folder / "events"), f".after_step_{start}")
    self._make_event = Event
    session = SessionLog(status=SessionLog.START)
    self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=session))
    self._flushed = time.monotonic()

  def log(self, values: dict[str, float], step: int) -> None:
    """Writes an event with a scalar for each value."""
    scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
    event = self._make_event(wall_time=time.time(), step=step, summary={"value": scalars})
    self._writer.write_event(event)
    if time.monotonic() - self._flushed > self.FLUSH_EVERY:
      self._writer.flush()
      self._flushed = time.monotonic()

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
      "name": RunFolder(Path(config.run)).name.rpartition("/")[2],
      "dir": config.run,
      "config": to_dict(config),
    }
    try:
      self._run = wandb.init(id=run_id, resume="allow", **options)
      if self._run.step > start + 1:  # the step that wandb expects next
        self._run.finish()
        self._run = wandb.init(resume_from=f"{run_id}?_step={start}", **options)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:  # no account
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
