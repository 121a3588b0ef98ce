"""What a run leaves on disk: configuration, metrics, evaluations, log, tokenizer, checkpoints, plot."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import TrainConfig, from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Paths of one run. `metrics` has one object per step (README lists its keys), `evals` one per evaluation."""

  path: Path

  config = property(lambda self: self.path / "config.json")
  metrics = property(lambda self: self.path / "metrics.jsonl")
  evals = property(lambda self: self.path / "eval.jsonl")
  log = property(lambda self: self.path / "log.txt")
  checkpoints = property(lambda self: self.path / "checkpoints")
  plot = property(lambda self: self.path / "loss.png")

  def create(self, config: TrainConfig) -> None:
    """Makes the folder and writes the resolved configuration; ValueError where something is there already."""
    if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
      what = f"`jaxlm resume {self.path}` goes on with it" if self.config.exists() else "and is not a run"
      raise ValueError(f"run={str(self.path)!r}: must be a new or empty folder; this one is not empty, {what}")
    self.path.mkdir(parents=True, exist_ok=True)
    self.write_config(config)

  def write_config(self, config: TrainConfig) -> None:
    self.config.write_text(json.dumps(to_dict(config), indent=2) + "\n")

  def read_config(self) -> TrainConfig:
    """ValueError where the folder is no run or its configuration does not parse."""
    if not self.config.is_file():
      raise ValueError(f"run={str(self.path)!r}: holds no config.json, so it is not the folder of a run")
    try:
      return from_dict(TrainConfig, json.loads(self.config.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
      raise ValueError(f"{self.config}: does not parse as a configuration: {error}") from error

  def forget_after(self, step: int) -> None:
    """Drops records of later steps, which a resumed run writes again, and any line cut short by a crash."""
    for path in (self.metrics, self.evals):
      if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step]
        path.write_text("".join(kept))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
  """The objects of a .jsonl file, up to the first line that is not whole."""
  with path.open() as lines:
    for line in lines:
      try:
        yield json.loads(line)
      except json.JSONDecodeError:
        return


def log_to(path: Path) -> logging.Handler:
  """Appends everything that this project logs to a file, with the time; returns the handler, for removal."""
  handler = logging.FileHandler(path)
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  logger = logging.getLogger("jaxlm")
  logger.setLevel(logging.INFO)
  logger.propagate = False  # the terminal has its own lines
  logger.addHandler(handler)
  return handler
