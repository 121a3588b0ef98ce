"""Seconds to trace, lower and compile a training step at 4 and 32 layers: scan keeps it flat.

    python benchmarks/compile_time.py --write benchmarks/results/compile_time_cpu.md

The `tiny` preset with `scan="always"`; each measurement in a process of its own, without a compilation cache, the two
depths taking turns.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

DEPTHS = (4, 32)


def measure(layers: int) -> float:
  """In this process: process time would count both cores, so this is wall time."""
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
  from train_step import versions

  environment = {
    key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
  }
  seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
  for _ in range(options.turns):
    for depth in DEPTHS:
      command = [sys.executable, __file__, "--layers", str(depth)]
      printed = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
      ).stdout
      seconds[depth].append(float(printed))
  lines = ["| layers | median seconds | min - max |", "|---|---|---|"]
  lines += [
    f"| {depth} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} |"
    for depth, values in seconds.items()
  ]
  ratio = statistics.median(long / short for short, long in zip(*seconds.values()))
  lines.append(f"\nMedian ratio of a turn, 32 layers to 4: {ratio:.2f}")
  report = (
    f"# Compile time\n\n    python benchmarks/compile_time.py\n\n{versions('jax', 'flax')}\n\n"
    + "\n".join(lines)
    + "\n"
  )
  print(report)
  if options.write:
    options.write.write_text(report)


if __name__ == "__main__":
  main()
