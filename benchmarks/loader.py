"""Tokens per second of the data loader alone, beside what a training step consumes.

    python -m benchmarks.loader --write benchmarks/results/loader_cpu.md

The loader runs with nothing else in the process, then `tiny` trains; both take the corpus and the
batch of that preset.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax

from benchmarks.table import publish, report, spread, table
from jaxlm import presets
from jaxlm.config import TrainConfig
from jaxlm.data.loader import load_text, train_loader
from jaxlm.run.memory import keep_freed_memory
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step


def loader_rates(config: TrainConfig, turns: int, batches: int) -> list[float]:
  """Returns the loader's tokens per second in each of so many turns of so many batches."""
  iterator = train_loader(load_text(config.data), batch=config.batch, seed=0)
  rates = []
  next(iterator)
  for _ in range(turns):
    start = time.perf_counter()
    for _ in range(batches):
      next(iterator)
    rates.append(batches * config.batch * config.data.length / (time.perf_counter() - start))
  iterator.close()
  return rates


def step_rates(config: TrainConfig, steps: int) -> list[float]:
  """Returns the tokens per second of each training step, after two that warm up."""
  keep_freed_memory()
  batch = next(train_loader(load_text(config.data), batch=config.batch, seed=0))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config))
  step = jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0)
  rates = []
  for _ in range(steps + 2):
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    rates.append(config.batch * config.data.length / (time.perf_counter() - start))
  return rates[2:]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", type=Path)
  options = parser.parse_args()
  tiny = presets.tiny()
  consumed = step_rates(tiny, steps=20)
  rows = []
  for layout in ("windows", "packed"):
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, layout=layout))
    rates = loader_rates(config, turns=10, batches=500)
    ratio = statistics.median(rates) / statistics.median(consumed)
    rows.append([layout, spread(rates, digits=0), spread(consumed, digits=0), f"{ratio:,.0f}"])
  columns = ["rows", "loader, tokens/s: median (10 % - 90 %)", "step", "loader / step"]
  publish(report("Data loader", table(columns, rows), "jax", "grain"), options.write)


if __name__ == "__main__":
  main()
