"""Starts `jaxlm` as real processes on a tiny corpus: for every test and campaign."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = (
  "--data.source text --data.length 32 --model.D 16 "
  "--model.pattern.0.feedforward.F 16 --model.pattern.0.mixer.H 8 "
  "--optimizer.warmup 1 --ema 0.9 --mesh.data 1 --eval_batches 1"
).split()


def write_corpus(folder: Path) -> Path:
  """Writes 40 Python files of one to three functions, about 3 kB; returns `folder`."""
  folder.mkdir(parents=True)
  for index in range(40):
    function = f"def f{index}(x):\n  return x + {index}\n"
    (folder / f"{index}.py").write_text(function * (1 + index % 3))
  return folder


def start_python(
  folder: Path, *arguments: str, printed: str = "printed.txt", **environment: str
) -> subprocess.Popen:
  """Starts this Python with these arguments in `folder`, on one CPU device unless told otherwise.

  Everything that it prints, on stdout and stderr, goes to the file `printed` in that folder.
  Programs are compiled as users get them, unless this process's environment says otherwise, and
  kept in a cache that the folder's processes share.
  """
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "COLUMNS": "200",
  }
  with open(folder / printed, "w") as file:
    return subprocess.Popen(
      [sys.executable, *arguments],
      cwd=folder,
      env=os.environ | variables | environment,
      stdout=file,
      stderr=subprocess.STDOUT,
    )


def start(folder: Path, *arguments: str, setup: str = "", **options: str) -> subprocess.Popen:
  """Starts `jaxlm` with these arguments like `start_python`, after the Python lines `setup`."""
  script = f"{setup}\nimport sys\nfrom jaxlm.cli import main\nsys.exit(main())"
  return start_python(folder, "-c", script, *arguments, **options)


def finish(
  folder: Path, process: subprocess.Popen, printed: str = "printed.txt", seconds: float = 600
) -> tuple[int, str]:
  """Waits for the end of a process, or kills it; returns its exit status and what it printed."""
  try:
    process.wait(seconds)
  finally:
    process.kill()
    process.wait()
  return process.returncode, (folder / printed).read_text()


def run(folder: Path, *arguments: str, **options: str) -> tuple[int, str]:
  """Runs `jaxlm` to its end; returns its exit status and what it printed."""
  return finish(folder, start(folder, *arguments, **options))


def cluster(processes: int) -> list[dict[str, str]]:
  """Returns the environment variables with which so many processes share one run."""
  if processes == 1:
    return [{}]
  with socket.socket() as unused:
    unused.bind(("localhost", 0))
    address = f"localhost:{unused.getsockname()[1]}"
  shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
  return [shared | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def wait_until(done: Callable[[], Any], process: subprocess.Popen, seconds: float = 300) -> None:
  """Returns as soon as `done()` is true or the process has ended.

  Raises TimeoutError, with the process killed, when neither comes.
  """
  end = time.monotonic() + seconds
  while process.poll() is None and not done():
    if time.monotonic() > end:
      process.kill()
      raise TimeoutError(f"not within {seconds} seconds")
    time.sleep(0.002)
