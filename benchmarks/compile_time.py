"""Seconds to trace, lower and compile a training step at 4 and 32 layers: scan keeps it flat.

    python -m benchmarks.compile_time --write benchmarks/results/compile_time_cpu.md

Takes the `tiny` preset with `scan="always"`. Each measurement is a process of its own, without a
compilation cache, and the two depths take turns.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import median_ratio, publish, report, spread, table

DEPTHS = (4, 32)


def measure(layers: int) -> float:
  """Returns the wall seconds of compiling in this process; process time would count both cores."""
  import jax
  import numpy as np

  from jaxlm import presets
  from jaxlm.data.loader import Batch
  from jaxlm.run.text import TextTask
  from jaxlm.train import init_state, make_train_step

  tiny = presets.tiny()
  config = dataclasses.replace(
    tiny, model=dataclasses.replace(tiny.model, layers=layers, scan="always")
  )
  shape = (config.batch, config.data.length)
  batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.float32))
  state = jax.eval_shape(lambda: init_state(config, TextTask(config)))
  start = time.perf_counter()
  jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0).lower(state, batch).compile()
  return time.perf_counter() - start


def measure_in_turns(turns: int) -> dict[int, list[float]]:
  """Returns the seconds of each depth, one per turn."""
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
  seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
  for _ in range(turns):
    for depth in DEPTHS:
      command = [sys.executable, "-m", "benchmarks.compile_time", "--layers", str(depth)]
      done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
      seconds[depth].append(float(done.stdout))
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--write", type=Path)
  parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.layers:
    print(measure(options.layers))
    return
  seconds = measure_in_turns(options.turns)
  rows = [[depth, spread(values)] for depth, values in seconds.items()]
  ratio = median_ratio(seconds[DEPTHS[1]], seconds[DEPTHS[0]])
  body = (
    f"{table(['layers', 'median seconds (10 % - 90 %)'], rows)}\n\n"
    f"Median ratio of a turn, {DEPTHS[1]} layers to {DEPTHS[0]}: {ratio:.2f}"
  )
  publish(report("Compile time", body, "jax", "flax"), options.write)


if __name__ == "__main__":
  main()
