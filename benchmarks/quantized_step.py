"""Seconds of a training step with quantised matmuls, against the plain step, turn by turn.

    python -m benchmarks.quantized_step --write benchmarks/results/quantized_step_cpu.md

The model has a million parameters (`jaxlm.presets.tiny`), in float32, with AdamW. Arms take turns,
so that a change of the machine's speed meets all of them.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.table import environment, median_ratio, publish, spread, table
from jaxlm import presets
from jaxlm.config import OptimizerConfig
from jaxlm.data.loader import Batch
from jaxlm.recipes import load_rules
from jaxlm.run.memory import keep_freed_memory_on_cpu
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step

ARMS = {"float32": "", "QuEST W4A4, Hadamard-32": "quest:4:4:32", "min-max W4A4": "minmax:4:4"}
"""Arms by recipe; F = 352 of this model has blocks of 32 and not of 128."""
BATCH, LENGTH = 16, 256
COLUMNS = ("matmuls", "median ms (10 % - 90 %)", "against float32")


def make_step(recipe: str):
  """Returns a function that runs one step and returns its seconds."""
  config = presets.tiny()
  rules = load_rules(recipe) if recipe else ()
  config = dataclasses.replace(
    config,
    batch=BATCH,
    model=dataclasses.replace(config.model, quant=rules),
    data=dataclasses.replace(config.data, length=LENGTH),
    optimizer=OptimizerConfig(schedule="constant", warmup=0),
  )
  task = TextTask(config)
  shape = (BATCH, LENGTH + 1)
  ids = np.random.default_rng(0).integers(0, config.model.V, shape, dtype=np.int32)
  batch = Batch(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:], np.float32))
  step = jax.jit(make_train_step(config, task), donate_argnums=0)
  state = jax.jit(lambda: init_state(config, task))()

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics["loss"])
    return time.perf_counter() - start

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--turns", type=int, default=20)
  parser.add_argument("--write", type=Path)
  arguments = parser.parse_args()
  keep_freed_memory_on_cpu()
  runs = {name: make_step(recipe) for name, recipe in ARMS.items()}
  for run in runs.values():
    run(), run()  # compiles, and settles
  seconds = {name: [] for name in runs}
  for _ in range(arguments.turns):
    for name, run in runs.items():
      seconds[name].append(run())
  rows = [
    (name, spread(times, 1, 1000), f"{median_ratio(times, seconds['float32']):.2f}")
    for name, times in seconds.items()
  ]
  page = f"{__doc__}\n{environment('jax', 'jaxlib')}\n\n{table(COLUMNS, rows)}\n"
  publish(page, arguments.write)


if __name__ == "__main__":
  main()
