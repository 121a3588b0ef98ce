"""environment.json of a run: for each start, what it ran on, and with which configuration.

A run repeats bit for bit only under the versions, flags and chips that it had, so a resume under others says so; and
one whose configuration no longer fits the checkpoints is refused before it starts.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.config_json import flatten, to_dict
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError

PACKAGES = (
  "jaxlm",
  "jax",
  "jaxlib",
  "libtpu",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "tokenizers",
)
_ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_PROCESS_ID")
_NOT_OF_WEIGHTS = ("max_length",)  # fields of the model that change no weight


def environment() -> dict[str, Any]:
  """Versions, flags, commit, chips and processes of this one."""
  flags = {
    name: os.environ[name]
    for name in sorted(os.environ)
    if name.startswith(("XLA_", "JAX_", "LIBTPU_"))
  }
  return {
    "python": platform.python_version(),
    "packages": {name: _version(name) for name in PACKAGES},
    "flags": {name: value for name, value in flags.items() if name not in _ADDRESSES},
    "commit": commit(Path(jaxlm.__file__).parents[1]),
    "platform": platform.platform(),
    "chip": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit(checkout: Path) -> str | None:
  """The commit of a git checkout, with "+changes" where tracked files differ from it; None without checkout or git."""
  if not (checkout / ".git").exists():
    return None
  git = ["git", "-C", str(checkout)]
  try:
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
  except OSError:  # no git
    return None
  return (
    head.stdout.strip() + "+changes" * (changed.returncode == 1) if head.returncode == 0 else None
  )


def starts(folder: RunFolder) -> list[dict[str, Any]]:
  """One object per start of the run, oldest first; none for a run from before they were kept, or a damaged file."""
  try:
    found = json.loads(folder.environment.read_text())
  except (OSError, ValueError):
    return []
  return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def record_start(folder: RunFolder, step: int, config: TrainConfig) -> list[str]:
  """Adds this start to environment.json; returns "name: before -> now" for what differs from the start before."""
  before = starts(folder)
  date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  now = {**environment(), "config": json.loads(json.dumps(to_dict(config)))}
  write_text(
    folder.environment, json.dumps([*before, {"date": date, "step": step, **now}], indent=1) + "\n"
  )
  return differences({name: before[-1].get(name) for name in now}, now) if before else []


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """ "a.b: 1 -> 2" for each value that differs; what only one side has is none on the other."""
  old, new = flatten(before), flatten(now)
  names = [*new, *(name for name in old if name not in new)]
  return [
    f"{name}: {old.get(name)} -> {new.get(name)}"
    for name in names
    if old.get(name) != new.get(name)
  ]


def check_fits(folder: RunFolder, config: TrainConfig) -> None:
  """ValueError where weights or optimizer state of the run's checkpoints cannot be those of `config`."""
  before = starts(folder)
  if not before or not isinstance(before[-1].get("config"), dict):
    return
  saved, now = (
    _shaping(values) for values in (before[-1]["config"], json.loads(json.dumps(to_dict(config))))
  )
  wrong = differences(saved, {name: value for name, value in now.items() if name in saved})
  if wrong:
    rule = "contradicts the checkpoints, which were written with other values (saved -> now)"
    raise UserError(f"{folder.config}: {rule}: {'; '.join(wrong)}")


def _shaping(config: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a configuration that decide what is in a checkpoint, by their paths."""
  model = {
    name: value for name, value in config.get("model", {}).items() if name not in _NOT_OF_WEIGHTS
  }
  rule, average = config.get("optimizer", {}).get("name"), bool(config.get("ema"))
  return flatten(
    {"model": model, "optimizer": {"name": rule}, "ema": "kept" if average else "not kept"}
  )
