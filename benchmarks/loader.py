"""Tokens per second of the data loader alone, beside what a training step consumes.

    python benchmarks/loader.py --write benchmarks/results/loader_cpu.md

The loader runs with nothing else in the process, then `tiny` trains; both on the corpus and batch of that preset.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
from train_step import versions

from jaxlm import presets
from jaxlm.data.loader import load_text, train_loader
from jaxlm.run.memory import keep_freed_memory
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step


def loader_rates(config, turns: int, batches: int) -> list[float]:
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


def step_rates(config, steps: int) -> list[float]:
  keep_freed_memory()
  batch = next(train_loader(load_text(config.data), batch=config.batch, seed=0))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config))
  step = jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0)
  rates = []
  for _ in range(steps + 2):
    start = time.perf_counter()
    state, metrics = step(state, batch)
    metrics["loss"].block_until_ready()
    rates.append(config.batch * config.data.length / (time.perf_counter() - start))
  return rates[2:]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", type=Path)
  options = parser.parse_args()
  lines = [
    "| rows | loader, tokens/s: median (min - max) | step | loader / step |",
    "|---|---|---|---|",
  ]
  consumed = step_rates(presets.tiny(), steps=20)
  for layout in ("windows", "packed"):
    tiny = presets.tiny()
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, layout=layout))
    rates = loader_rates(config, turns=10, batches=500)
    ratio = statistics.median(rates) / statistics.median(consumed)
    lines.append(
      f"| {layout} | {statistics.median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f}) "
      f"| {statistics.median(consumed):,.0f} | {ratio:,.0f} |"
    )
  report = (
    f"# Data loader\n\n    python benchmarks/loader.py\n\n{versions('jax', 'grain')}\n\n"
    + "\n".join(lines)
    + "\n"
  )
  print(report)
  if options.write:
    options.write.write_text(report)


if __name__ == "__main__":
  main()
