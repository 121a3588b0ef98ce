"""Names, writes and reads what a run leaves on disk: configuration, records, log, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.config_json import from_dict, to_dict
from jaxlm.interop.strict_json import read_object
from jaxlm.paths import left_by_system, local_path
from pallas_kernels.common.errors import UserError

_log = logging.getLogger("jaxlm")
_LONGEST_CONFIG = 2**20  # bytes
NO_FOLDER = "no such folder; it names the folder of a run"
ADDRESS = ".address"  # in the copy of a run that is on an object store, names it
LOCK = "lock"  # names the process that writes to the run (`jaxlm.run.lock`)


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Names the files of one run.

  `metrics` has one object per step (README lists its keys), `evals` one per evaluation.
  """

  path: Path

  config = property(lambda self: self.path / "config.json")
  metrics = property(lambda self: self.path / "metrics.jsonl")
  evals = property(lambda self: self.path / "eval.jsonl")
  log = property(lambda self: self.path / "log.txt")
  checkpoints = property(lambda self: self.path / "checkpoints")
  plot = property(lambda self: self.path / "loss.png")
  bad_steps = property(lambda self: self.path / "bad_steps")
  environment = property(lambda self: self.path / "environment.json")
  text = property(lambda self: self.path / "text.json")
  trackers = property(lambda self: self.path / "trackers.json")
  published = property(lambda self: self.path / "published")

  @classmethod
  def at(cls, name: str | Path, field: str = "run") -> RunFolder:
    """Returns the folder of this name, `~` expanded; UserError for one that no folder can have."""
    return cls(local_path(name, field))

  @property
  def name(self) -> str:
    """Returns what a user calls the run: its address, or its path."""
    address = self.path / ADDRESS
    return address.read_text() if address.is_file() else str(self.path)

  def check_new(self) -> None:
    """Raises UserError where something is there already, but for the lock and systems' files."""
    if self.path.is_dir():
      in_use = any(not _is_free(path.name) for path in self.path.iterdir())
    else:
      in_use = self.path.exists()
    if in_use:
      hint = f"`jaxlm resume {self.name}` goes on with it"
      hint = hint if self.config.exists() else "and is not a run"
      rule = "must be a new or empty folder; this one is not empty"
      raise UserError(f"run={str(self.path)!r}: {rule}, {hint}")

  def create(self, config: TrainConfig) -> None:
    """Makes the folder, which must be new, and writes the resolved configuration."""
    self.check_new()
    self.path.mkdir(parents=True, exist_ok=True)
    self.write_config(config)

  def write_config(self, config: TrainConfig) -> None:
    """Writes config.json in one step."""
    write_text(self.config, json.dumps(to_dict(config), indent=2) + "\n")

  def read_config(self) -> TrainConfig:
    """Reads config.json; raises UserError where there is none, or one that does not parse."""
    if not self.config.is_file():
      rule = "holds no config.json, so it is not the folder of a run"
      rule = rule if self.path.is_dir() else NO_FOLDER
      raise UserError(f"run={str(self.path)!r}: {rule}")
    return read_config(self.config)

  def forget_after(self, step: int) -> None:
    """Drops records of later steps, which a resumed run writes again, and a line cut by a crash."""
    for path in (self.metrics, self.evals):
      if path.exists():
        records = [record for record in read_records(path) if record["step"] <= step]
        write_text(path, "".join(map(to_line, records)))


def _is_free(name: str) -> bool:
  return name == LOCK or left_by_system(name)


def read_config(path: Path) -> TrainConfig:
  """Reads a file that `write_config` wrote; raises UserError with the file and what is wrong."""
  values = read_object(path, _LONGEST_CONFIG)
  try:
    return from_dict(TrainConfig, values)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def to_line(record: Mapping[str, Any]) -> str:
  """Returns a record of numbers as one line of JSON, in which a number that is not finite is null.

  JSON has no NaN: most other programs refuse a line that holds one.
  """
  values = {name: x.item() if hasattr(x, "item") else x for name, x in record.items()}
  finite = {
    name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()
  }
  return json.dumps(finite, allow_nan=False) + "\n"


class RecordFile:
  """Appends objects to a .jsonl file, which is opened with the first of them.

  What the disk has no room for waits in memory and is tried again with the next object.
  """

  def __init__(self, path: Path | str):
    self._path = path
    self._file: io.FileIO | None = None
    self._waiting = b""
    self._failing = False

  def append(self, record: dict[str, Any]) -> None:
    """Appends one object as a line, after those that wait in memory."""
    self._waiting += to_line(record).encode()
    self._write()

  def close(self) -> None:
    """Writes the lines that wait, logs those that could not be written, and closes the file."""
    self._write()
    if self._waiting:
      _log.error("%s: lacks its last %d lines", self._path, self._waiting.count(b"\n"))
    if self._file is not None:
      self._file.close()

  def _write(self) -> None:
    try:
      if self._file is None and self._waiting:
        self._file = open(self._path, "ab", buffering=0)
      while self._file is not None and self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
    except OSError as error:
      if not self._failing:
        _log.error("%s: lines wait in memory: %s", self._path, error.strerror)
      self._failing = True
    else:
      self._failing = False


def read_records(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a .jsonl file, up to the first line that is not whole; null is NaN."""
  with path.open() as lines:
    for line in lines:
      try:
        record = json.loads(line)
      except json.JSONDecodeError:
        return
      yield {name: math.nan if value is None else value for name, value in record.items()}


@contextlib.contextmanager
def log_to(path: Path | str | None) -> Iterator[None]:
  """Appends what this project logs to a file, if given, with the time; errors go to stderr too.

  An exception that ends the run is logged with its traceback, a UserError with its message alone.
  Afterwards the logger is as it was.
  """
  logger = logging.getLogger("jaxlm")
  propagate, level = logger.propagate, logger.level
  errors = logging.StreamHandler()
  errors.setLevel(logging.ERROR)
  errors.addFilter(lambda record: record.exc_info is None)  # Python prints what ends the run
  handlers: list[logging.Handler] = [errors]
  if path is not None:
    handlers.append(_LogFile(path))
    handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
  logger.propagate = False  # the terminal has its own lines
  for handler in handlers:
    logger.addHandler(handler)
  try:
    yield
  except UserError as error:
    logger.info("stopped: %s", error)
    raise
  except Exception as error:
    logger.error("stopped by %s", type(error).__name__, exc_info=True)
    raise
  finally:
    for handler in handlers:
      logger.removeHandler(handler)
      handler.close()
    logger.propagate = propagate
    logger.setLevel(level)


class _LogFile(logging.FileHandler):
  """Writes the log; a file that cannot be opened and a full disk cost lines of it, nothing else."""

  def __init__(self, path: Path | str):
    super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
    self._refused = False

  def emit(self, record: logging.LogRecord) -> None:
    """Writes a line, for which it opens the file if it is not open; logs the first refusal."""
    try:
      super().emit(record)
    except OSError as error:  # of opening; those of writing come to `handleError`
      if not self._refused:
        self._refused = True
        _log.error("%s: lines of the log are lost: %s", self.baseFilename, error.strerror)

  def handleError(self, record: logging.LogRecord) -> None:
    """Ignores a refusing file system; reports any other fault as logging does."""
    if not isinstance(sys.exc_info()[1], OSError):
      super().handleError(record)

  def close(self) -> None:
    """Closes the file, even where what is buffered has no room."""
    with contextlib.suppress(OSError):
      super().close()
