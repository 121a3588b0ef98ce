"""Records in environment.json, for each start of a run, what it ran on and its configuration.

A run repeats bit for bit only under the versions, flags and chips that it had, so a resume under
others prints what differs.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig
from jaxlm.config_json import flatten, to_dict
from jaxlm.run.run_folder import RunFolder

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
_PLACES = (  # variables that change no number
  "JAX_COORDINATOR_ADDRESS",
  "JAX_COORDINATOR_BIND_ADDRESS",
  "JAX_PROCESS_ID",
  "JAX_COMPILATION_CACHE_DIR",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


def environment() -> dict[str, Any]:
  """Returns versions, flags, commit, chips and processes of this process."""
  flags = {
    name: os.environ[name]
    for name in sorted(os.environ)
    if name.startswith(("XLA_", "JAX_", "LIBTPU_"))
  }
  return {
    "python": platform.python_version(),
    "packages": {name: _version(name) for name in PACKAGES},
    "flags": {name: value for name, value in flags.items() if name not in _PLACES},
    "commit": commit(Path(jaxlm.__file__).parents[1]),
    "platform": platform.platform(),
    "chip": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }


def count_cores() -> int:
  """Returns how many processor cores this process may use, as taskset or a container limits it."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@functools.cache
def hardware() -> str:
  """Returns the accelerator if there is one, the processor and how many cores this process has."""
  processor = platform.machine()
  if Path("/proc/cpuinfo").exists():
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    about = dict(re.findall(r"^(.*?)\s*:\s*(.*)$", first, re.MULTILINE))
    numbers = f"family {about.get('cpu family')}, model {about.get('model')}"
    processor = f"{about.get('model name', processor)} ({numbers})"
  cores = count_cores()
  machine = f"{cores} core{'' if cores == 1 else 's'} of {processor}"
  if jax.default_backend() != "cpu":
    machine = f"{jax.devices()[0].device_kind}, {machine}"
  return machine


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit(checkout: Path) -> str | None:
  """Returns the commit of a git checkout, with "+changes" where tracked files differ from it.

  Returns None where there is no checkout or no git.
  """
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
  """Returns one object per start of the run, oldest first; [] for a missing or damaged file."""
  try:
    saved = json.loads(folder.environment.read_text())
  except (OSError, ValueError):
    return []
  return [start for start in saved if isinstance(start, dict)] if isinstance(saved, list) else []


def record_start(
  folder: RunFolder,
  step: int,
  config: TrainConfig,
  data: Sequence[str] = (),
  matmuls: Sequence[str] = (),
) -> list[str]:
  """Adds this start to environment.json; returns how it differs from the start before.

  `data` is what `Task.report` says of the data, `matmuls` what `Task.matmuls` says of formats; both
  are recorded and not compared.
  """
  before = starts(folder)
  date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  now = {**environment(), "config": json.loads(json.dumps(to_dict(config)))}
  start = {"date": date, "step": step, **now, "data": list(data), "matmuls": list(matmuls)}
  write_text(folder.environment, json.dumps([*before, start], indent=1) + "\n")
  return differences({name: before[-1].get(name) for name in now}, now) if before else []


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns a line "path: before -> now" for each value that differs; a missing one is None."""
  old, new = flatten(before), flatten(now)
  names = [*new, *(name for name in old if name not in new)]
  return [
    f"{name}: {old.get(name)} -> {new.get(name)}"
    for name in names
    if old.get(name) != new.get(name)
  ]
