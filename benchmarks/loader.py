"""Tokens per second of the data loader alone, beside what a training step consumes.

    python -m benchmarks.loader --write benchmarks/results/loader_cpu.md

The loader runs with nothing else in the process, then `tiny` trains; both take the batch of that
preset. The text is that preset's, whose tokens are held in memory, and 40 times that text in a
token store on disk, of which a process keeps 64 MiB. Last, how fast stores are written.
"""

import argparse
import dataclasses
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.table import publish, report, spread, table
from jaxlm import presets
from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data.loader import load_text, train_loader
from jaxlm.data.tokenize import tokenize
from jaxlm.data.tokenizer import train_bpe
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


def write_store(folder: Path, tokenizer: str, copies: int) -> float:
  """Writes a store of so many copies of Python's sources; returns its MB of text per second."""
  text = folder / "text.txt"
  if not text.exists():
    root = Path(sysconfig.get_path("stdlib"))
    parts = [path.read_bytes() for path in sorted(root.glob("*.py"))]
    with text.open("wb") as file:
      for _ in range(copies):
        file.writelines(parts)
  start = time.perf_counter()
  config = DataConfig(source=str(text), tokenizer=tokenizer)
  store = tokenize(config, folder / ("bytes" if tokenizer == "bytes" else "bpe"))
  return (store.train.size + store.heldout.size) / (time.perf_counter() - start) / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", type=Path)
  options = parser.parse_args()
  tiny = presets.tiny()
  consumed = step_rates(tiny, steps=20)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    speed = write_store(Path(folder), "bytes", copies=40)
    for place, source in (("memory", "stdlib"), ("disk", f"{folder}/bytes")):
      for layout in ("windows", "packed"):
        data = dataclasses.replace(tiny.data, layout=layout, source=source)
        rates = loader_rates(dataclasses.replace(tiny, data=data), turns=10, batches=500)
        ratio = statistics.median(rates) / statistics.median(consumed)
        spreads = [spread(rates, digits=0), spread(consumed, digits=0)]
        rows.append([f"{layout}, from {place}", *spreads, f"{ratio:,.0f}"])
    train_bpe([(Path(folder) / "text.txt").read_text()[: 2**22]], 4096).save(Path(folder))
    (Path(folder) / "text.txt").unlink()
    bpe_speed = write_store(Path(folder), f"{folder}/tokenizer.json", copies=2)
  columns = ["rows", "loader, tokens/s: median (10 % - 90 %)", "step", "loader / step"]
  body = f"{table(columns, rows)}\n\n" + (
    f"`jaxlm tokenize` writes {speed:.0f} MB of text per second as bytes, {bpe_speed:.1f} MB per "
    "second with a byte-pair encoding of 4096 tokens.\n"
  )
  publish(report("Data loader", body, "jax", "grain", "tensorstore"), options.write)


if __name__ == "__main__":
  main()
