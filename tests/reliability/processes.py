"""Real processes and what they leave, for tests and campaigns that interrupt, damage and starve them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.checkpoint import restore
from jaxlm.checkpoint.folder import checkpoint_path
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from sharding import make_mesh

ROOT = Path(__file__).parents[2]
SMALL = (
  "--data.source text --data.length 32 --model.D 16 --model.F 16 --model.H 8 --optimizer.warmup 1 --ema 0.9 "
  "--mesh.data 1 --eval_batches 1"
).split()


def write_corpus(folder: Path) -> None:
  (folder / "text").mkdir(parents=True)
  for index in range(40):
    (folder / "text" / f"{index}.py").write_text(
      f"def f{index}(x):\n  return x + {index}\n" * (1 + index % 3)
    )


def start(folder: Path, *arguments: str, setup: str = "", **environment: str) -> subprocess.Popen:
  """`jaxlm` with these arguments in `folder`, after the Python lines `setup`; what it says goes to printed.txt."""
  script = f"{setup}\nimport sys\nfrom jaxlm.cli import main\nsys.exit(main())"
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "COLUMNS": "200",
  }
  with open(folder / "printed.txt", "w") as printed:
    return subprocess.Popen(
      [sys.executable, "-c", script, *arguments],
      cwd=folder,
      env=os.environ | variables | environment,
      stdout=printed,
      stderr=subprocess.STDOUT,
    )


def finish(folder: Path, process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
  """(exit status, what it printed)"""
  try:
    process.wait(seconds)
  finally:
    process.kill()
    process.wait()
  return process.returncode, (folder / "printed.txt").read_text()


def run(folder: Path, *arguments: str, **options: str) -> tuple[int, str]:
  return finish(folder, start(folder, *arguments, **options))


def wait_until(done: Callable[[], Any], process: subprocess.Popen, seconds: float = 300) -> None:
  """Polls; returns early when the process ends. TimeoutError, with the process killed, when neither comes."""
  end = time.monotonic() + seconds
  while process.poll() is None and not done():
    if time.monotonic() > end:
      process.kill()
      raise TimeoutError(f"not within {seconds} seconds")
    time.sleep(0.002)


def last_step(folder: RunFolder) -> int:
  """Of metrics.jsonl; 0 where there is none."""
  return max((record["step"] for record in records(folder)), default=0)


def records(folder: RunFolder) -> list[dict[str, Any]]:
  """What a repeated run must repeat exactly: all of metrics.jsonl but for times."""
  if not folder.metrics.exists():
    return []
  return [
    {name: value for name, value in record.items() if "seconds" not in name}
    for record in read_records(folder.metrics)
  ]


def same_end(folder: RunFolder, other: RunFolder) -> bool:
  """Whether two runs have the same curve, evaluations and final state, bit for bit."""
  if records(folder) != records(other) or folder.evals.read_text() != other.evals.read_text():
    return False
  ours, theirs = (_final_state(run) for run in (folder, other))
  return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
    np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
  )


def _final_state(folder: RunFolder) -> Any:
  config = folder.read_config()
  with jax.set_mesh(make_mesh(config.mesh)):
    like = jax.eval_shape(lambda: init_state(config, TextTask(config)))
    state, position = restore(checkpoint_path(folder.checkpoints, config.steps), like)
  return jax.device_get(state._replace(key=jax.random.key_data(state.key))), json.dumps(
    position, sort_keys=True
  )
