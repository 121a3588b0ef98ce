"""Seconds to trace, lower and compile a training step by depth: scans keep it flat.

    python -m benchmarks.compile_time --write benchmarks/results/compile_time_cpu.md

Takes the `tiny` preset with `scan="always"`: 4 layers, 32 layers, and 61 layers whose first 3 have
another feed-forward. Each measurement is a process of its own, without a compilation cache, and
the models take turns.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import median_ratio, publish, report, spread, table

BASE = "4"
LIMITS = {"32": 1.3, "61, of which 3 differ": 1.5}
"""model -> how many times the compile time of 4 layers it may take"""


def run_config(name: str):
  """Returns the configuration of the run with the model of this name."""
  from jaxlm import presets
  from jaxlm.config import ComputeConfig, revise

  tiny = presets.tiny()
  model = revise(tiny.model, layers=int(name.partition(",")[0]))
  if "differ" in name:
    model = dataclasses.replace(model, prefix=revise(model, F=512).pattern * 3)
  return dataclasses.replace(tiny, model=model, compute=ComputeConfig(scan="always"))


def measure(name: str) -> float:
  """Returns the wall seconds of compiling in this process; process time would count both cores."""
  from jaxlm.run.text import TextTask
  from jaxlm.train.lowering import lower_step
  from sharding import make_mesh

  config = run_config(name)
  task, mesh = TextTask(config), make_mesh(config.mesh)
  start = time.perf_counter()
  lower_step(config, task, task.batch_types(), mesh).compile()
  return time.perf_counter() - start


def measure_in_turns(turns: int) -> dict[str, list[float]]:
  """Returns the seconds of each model, one per turn."""
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
  seconds: dict[str, list[float]] = {name: [] for name in (BASE, *LIMITS)}
  for _ in range(turns):
    for name, values in seconds.items():
      command = [sys.executable, "-m", "benchmarks.compile_time", "--model", name]
      done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
      values.append(float(done.stdout))
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--write", type=Path)
  parser.add_argument("--model", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.model:
    print(measure(options.model))
    return
  seconds = measure_in_turns(options.turns)
  rows = [[BASE, spread(seconds[BASE]), "1", ""]]
  for name, limit in LIMITS.items():
    ratio = median_ratio(seconds[name], seconds[BASE])
    rows.append([name, spread(seconds[name]), f"{ratio:.2f}", limit])
  columns = ["layers", "median seconds (10 % - 90 %)", "median ratio of a turn", "limit"]
  publish(report("Compile time", table(columns, rows), "jax", "flax"), options.write)


if __name__ == "__main__":
  main()
