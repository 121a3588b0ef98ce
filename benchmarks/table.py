"""Writes the tables of all benchmarks: command, hardware, versions, and a spread for every time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
  """Returns a Markdown table with one line per row."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
  """Returns "median (10 % - 90 %)" of the values, each multiplied by `scale`."""
  low, middle, high = np.quantile(np.asarray(values) * scale, (0.1, 0.5, 0.9))
  return f"{middle:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
  """Returns the median over turns of slower / faster: the machine's speed cancels in a turn."""
  return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def hardware() -> str:
  """Returns a short name for file names: the accelerator's kind, or "cpu" and its cores."""
  import jax

  from jaxlm.run.environment import count_cores

  device = jax.devices()[0]
  if device.platform == "cpu":
    return f"cpu{count_cores()}"
  return device.device_kind.replace(" ", "_").lower()


def environment(*libraries: str) -> str:
  """Returns one line: date, accelerator, processor, Python, and the version of each library."""
  from jaxlm.run import environment as run_environment

  versions = ", ".join(f"{name} {version(name)}" for name in libraries)
  date = datetime.date.today().isoformat()
  return f"{date}; {run_environment.hardware()}, Python {platform.python_version()}, {versions}"


def version(library: str) -> str:
  """Returns the installed version of a library, or "not installed"."""
  try:
    return importlib.metadata.version(library)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def report(title: str, body: str, *libraries: str) -> str:
  """Returns a whole page: title, the command that made it, `environment(*libraries)`, body."""
  module = sys.modules["__main__"].__spec__
  name = f"-m {module.name}" if module else sys.argv[0]
  command = " ".join(["python", name, *sys.argv[1:]]).replace(".__main__", "")
  return f"# {title}\n\n    {command}\n\n{environment(*libraries)}\n\n{body.strip()}\n"


def publish(page: str, path: Path | None) -> None:
  """Prints a page, and writes it to the path where there is one."""
  print(page)
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
