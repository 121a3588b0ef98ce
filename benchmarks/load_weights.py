"""Loading a Hugging Face checkpoint against reading its file: seconds, and memory on the host.

    python -m benchmarks.load_weights --write benchmarks/results/load_weights_cpu.md

A checkpoint of Qwen2.5-1.5B's shape with random bfloat16 weights is written first. Every
measurement is a process of its own, and arms take turns, so that a change of the machine's speed
meets all of them: "read" reads the file into memory, "load" is `jaxlm.interop.huggingface.load`,
which transposes and stacks every matrix on the way. Each is timed with the file in the page cache
and after it was dropped from there. Memory is the peak of the process above what it held when jax
was ready.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import publish, report, spread, table

ARMS = ("read", "load")
CACHES = ("cached", "dropped")
COLUMNS = (
  "page cache",
  "arm",
  "median s (10 % - 90 %)",
  "best s",
  "CPU s",
  "median / read",
  "best / read",
  "peak GB",
  "peak / file",
)


def write_checkpoint(folder: Path, preset: str) -> None:
  """Writes random finite bfloat16 weights of the preset's shape."""
  import jax
  import ml_dtypes

  from jaxlm import presets
  from jaxlm.interop import huggingface
  from jaxlm.models import Transformer

  config = getattr(presets, preset)().model
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  draw = np.random.default_rng(0)
  below_two = 0xBFFF  # as bits, so that every weight is finite

  def leaf(x):
    return (draw.integers(0, 2**16, x.shape, np.uint16) & below_two).view(ml_dtypes.bfloat16)

  huggingface.save(folder, config, jax.tree.map(leaf, shapes))


def drop_from_cache(path: Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes() -> int:
  return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
  """Returns the peak of this program; getrusage would count what it held before exec."""
  status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
  return int(status["VmHWM"].split()[0]) * 1024


def measure_once(arm: str, cache: str, folder: Path) -> None:
  """Prints seconds, CPU seconds and peak bytes of one arm in this process."""
  import jax

  from jaxlm.interop import huggingface

  jax.devices()
  file = folder / "model.safetensors"
  if cache == "dropped":
    drop_from_cache(file)
  before, start, used = resident_bytes(), time.perf_counter(), sum(os.times()[:2])
  kept = file.read_bytes() if arm == "read" else huggingface.load(folder)
  seconds, used = time.perf_counter() - start, sum(os.times()[:2]) - used
  assert len(kept) >= 2
  peak = peak_resident_bytes() - before
  print(json.dumps({"seconds": seconds, "cpu": used, "peak": peak}))


def measure(folder: Path, turns: int) -> dict[tuple[str, str], list[dict]]:
  """Returns the answers of `measure_once` for each (cache, arm), one per turn."""
  results: dict[tuple[str, str], list[dict]] = {
    (cache, arm): [] for cache in CACHES for arm in ARMS
  }
  for _ in range(turns):
    for cache, arm in results:
      command = [sys.executable, "-m", "benchmarks.load_weights", "--folder", str(folder)]
      command += ["--arm", arm, "--cache", cache]
      answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
      results[cache, arm].append(json.loads(answer))
  return results


def rows_of(results: dict[tuple[str, str], list[dict]], size: int) -> list[list[str]]:
  """Returns the lines of the table for a file of `size` bytes."""
  rows = []
  for (cache, arm), answers in results.items():
    seconds = [answer["seconds"] for answer in answers]
    read = [answer["seconds"] for answer in results[cache, "read"]]
    peak = max(answer["peak"] for answer in answers)
    rows.append(
      [
        cache,
        arm,
        spread(seconds),
        f"{min(seconds):.2f}",
        spread([answer["cpu"] for answer in answers]),
        f"{statistics.median(seconds) / statistics.median(read):.2f}",
        f"{min(seconds) / min(read):.2f}",
        f"{peak / 1e9:.2f}",
        f"{peak / size:.2f}",
      ]
    )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--preset", default="qwen2_5_1_5b")
  parser.add_argument(
    "--folder", type=Path, help="keeps the checkpoint here, and uses one that is here"
  )
  parser.add_argument("--write", type=Path)
  parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
  parser.add_argument("--cache", choices=CACHES, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.arm:
    measure_once(options.arm, options.cache, options.folder)
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.folder or Path(temporary) / "checkpoint"
    if not (folder / "config.json").exists():
      write_checkpoint(folder, options.preset)
    size = (folder / "model.safetensors").stat().st_size
    busy = os.getloadavg()[0]
    results = measure(folder, options.turns)
  body = (
    f"{options.preset}, {size:,} bytes of bfloat16; {options.turns} turns; "
    f"load average {busy:.1f} before and {os.getloadavg()[0]:.1f} after\n\n"
    f"{table(COLUMNS, rows_of(results, size))}"
  )
  publish(report("Loading weights on CPU", body, "jax", "numpy"), options.write)


if __name__ == "__main__":
  main()
