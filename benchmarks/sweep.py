"""What a sweep gains: runs under one vmap against single steps, one process against many starts.

    python -m benchmarks.sweep --write benchmarks/results/sweep_cpu2.md

Takes a preset (`micro`) and learning rates around its own. Per step: the jitted training step of so
many runs under vmap, in turns with the step of a single run, on whatever device jax finds (a GPU
too). Whole: `jaxlm.scaling.sweep` in a process of its own, which imports, reads the text and
compiles once, against `jaxlm train` once per learning rate, which does all of it each time and
writes its folder with a checkpoint. Nothing uses a compilation cache. With `--starts` below
`--runs`, the time of all starts is that of their mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.table import median_ratio, publish, report, spread, table
from jaxlm import presets
from jaxlm.config import MeshConfig, TrainConfig


def run_config(preset: str, steps: int) -> TrainConfig:
  """Returns the preset on one device with so many steps."""
  config = getattr(presets, preset)()
  return dataclasses.replace(config, steps=steps, mesh=MeshConfig(data=1))


def learning_rates(config: TrainConfig, runs: int) -> list[float]:
  """Returns rates from a tenth of the preset's own to three times it."""
  rate = config.optimizer.learning_rate
  return np.geomspace(rate / 10, 3 * rate, runs).tolist()


def stepper(config: TrainConfig, runs: int) -> Callable[[], tuple[float, float]]:
  """Returns a function that does a compiled step of so many runs: (wall seconds, CPU seconds)."""
  import jax
  import jax.numpy as jnp

  from jaxlm.data.loader import Batch
  from jaxlm.run.text import TextTask
  from jaxlm.train import init_state, make_train_step

  task = TextTask(config)
  shape = (config.batch, config.data.length + 1)
  ids_BT = np.random.default_rng(0).integers(0, config.model.V, shape).astype(np.int32)
  batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], np.ones_like(ids_BT[:, 1:], np.float32))
  step = make_train_step(config, task)
  init = lambda seed: init_state(config, task, seed=seed)  # noqa: E731
  if runs > 1:
    step, init = jax.vmap(step, in_axes=(0, None)), jax.vmap(init)
  state = jax.jit(init)(jnp.arange(runs) if runs > 1 else 0)
  jitted = jax.jit(step, donate_argnums=0)

  def timed() -> tuple[float, float]:
    nonlocal state
    start, cpu_start = time.perf_counter(), time.process_time()
    state, metrics = jitted(state, batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - start, time.process_time() - cpu_start

  timed()
  return timed


def per_step(config: TrainConfig, sizes: list[int], turns: int) -> str:
  """Returns a table of the time of one step of one run, by how many are under vmap."""
  import jax

  from jaxlm.run.memory import keep_freed_memory

  if jax.default_backend() == "cpu":
    keep_freed_memory()
  steppers = {runs: stepper(config, runs) for runs in (1, *sizes)}
  seconds: dict[int, list[float]] = {runs: [] for runs in steppers}
  cpu_seconds: dict[int, list[float]] = {runs: [] for runs in steppers}
  for _ in range(turns):
    for runs, timed in steppers.items():
      times = [timed() for _ in range(max(1, 8 // runs))]
      seconds[runs].append(statistics.median(wall for wall, _ in times) / runs)
      cpu_seconds[runs].append(statistics.median(cpu for _, cpu in times) / runs)
  rows = [
    [
      runs,
      spread(values, 2, 1e3),
      f"{1e3 * min(values):.2f}",
      f"{median_ratio(seconds[1], values):.2f}",
      f"{min(seconds[1]) / min(values):.2f}",
      f"{1e3 * statistics.median(cpu_seconds[runs]):.2f}",
    ]
    for runs, values in seconds.items()
  ]
  columns = ["runs under vmap", "ms per run and step", "best", "gain", "gain of the best", "CPU ms"]
  load = "load averages of the machine " + ", ".join(f"{value:.1f}" for value in os.getloadavg())
  return f"{jax.devices()[0].device_kind}; {load}\n\n{table(columns, rows)}"


def whole(options: argparse.Namespace, config: TrainConfig) -> str:
  """Returns a table of the time of the whole sweep in one process and in one for each run."""
  rates = learning_rates(config, options.runs)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
  with tempfile.TemporaryDirectory() as folder:
    program = [sys.executable, "-m", "benchmarks.sweep", "--as-sweep", f"{folder}/table.csv"]
    program += ["--preset", options.preset, "--train-steps", str(options.train_steps)]
    one_process = timed_run([*program, "--runs", str(options.runs)], environment)
    starts = []
    for index in np.linspace(0, options.runs - 1, options.starts).astype(int):
      flags = ["--steps", str(config.steps), "--mesh.data", "1", "--run", f"{folder}/{index}"]
      flags += ["--save_every", "0", "--eval_every", "0"]
      flags += ["--optimizer.learning_rate", str(rates[index])]
      command = [sys.executable, "-m", "jaxlm", "train", options.preset, *flags]
      starts.append(timed_run(command, environment))
  total = statistics.mean(starts) * options.runs
  rows = [
    ["one process, one vmap", f"{one_process:.0f}", f"{total / one_process:.1f}"],
    [f"{options.runs} starts (mean of {options.starts})", f"{total:.0f}", "1"],
  ]
  return f"One start: {spread(starts, 1)} s\n\n" + table(["", "seconds", "gain"], rows)


def timed_run(command: list[str], environment: dict[str, str]) -> float:
  """Returns the seconds of a process from start to end."""
  start = time.perf_counter()
  subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--preset", default="micro")
  parser.add_argument("--runs", type=int, default=32, help="learning rates of the whole sweep")
  parser.add_argument("--train-steps", type=int, default=50, help="steps of each run")
  parser.add_argument("--starts", type=int, default=32, help="how many single runs are timed")
  parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 32], help="runs under vmap")
  parser.add_argument("--turns", type=int, default=30, help="timings of each size")
  parser.add_argument("--parts", nargs="+", default=["step", "whole"], choices=["step", "whole"])
  parser.add_argument("--write", type=Path)
  parser.add_argument("--as-sweep", help=argparse.SUPPRESS)
  options = parser.parse_args()
  config = run_config(options.preset, options.train_steps)
  if options.as_sweep:
    from jaxlm.scaling.sweep import sweep

    grid = {"optimizer.learning_rate": learning_rates(config, options.runs)}
    sweep(config, grid, options.as_sweep)
    return
  sections = []
  if "whole" in options.parts:  # first, before this process holds a GPU's memory
    sections.append(
      f"## Whole: {options.runs} runs of `{options.preset}`\n\n{whole(options, config)}"
    )
  if "step" in options.parts:
    shown = per_step(config, options.sizes, options.turns)
    sections.insert(0, f"## Per step\n\n{shown}")
  publish(report("Sweep", "\n\n".join(sections), "jax", "flax"), options.write)


if __name__ == "__main__":
  main()
