"""Times products of blockwise 8-bit codes and their quantisers beside other libraries.

    python -m benchmarks.fp8_matmul [--shape M K N] [--turns N] [--out FOLDER]

The three products of Y = X W in e4m3 with a float32 scale for 128 or 128 x 128 numbers: this
project's implementations, qwix's 2-D tiles, and on a GPU torch's block-scaled `scaled_mm` and
torchao's Triton kernels, beside XLA's bfloat16 product. Quantisers, and the rotation fused with
one, beside the bandwidth of a copy. What disagrees with the reference is not timed. Every turn
runs all arms. Writes fp8_matmul_<hardware>.json and .md, with versions, and with what was not run
and why. On a CPU the codes are emulated: its times say nothing of another platform.
"""

# Y[M, N] = X[M, K] W[K, N]
from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fp8_arms
from benchmarks.table import hardware, publish, report, spread, table, version
from pallas_kernels.fp8_matmul import Quantized

GPU_SHAPE = (4096, 7168, 16384)
CPU_SHAPE = (512, 1024, 768)
LIBRARIES = ("jax", "jaxlib", "qwix", "torch", "triton", "torchao")
NO_GPU = dict.fromkeys(
  ("fp8_matmul, pallas_gpu", "torch scaled_mm, by block", "torchao (Triton)"),
  "no GPU on this machine",
)


@jax.jit
def relative(got: jax.Array, want: jax.Array) -> jax.Array:
  """Returns the norm of the difference over the norm of `want`."""
  difference = got.astype(jnp.float32) - want.astype(jnp.float32)
  return jnp.linalg.norm(difference) / jnp.linalg.norm(want.astype(jnp.float32))


@jax.jit
def mismatches(got: Quantized, want: Quantized) -> jax.Array:
  """Returns the fraction of codes that differ in value."""
  return jnp.mean(got.codes.astype(jnp.float32) != want.codes.astype(jnp.float32))


def check(
  makers: Iterable[tuple[str, float, fp8_arms.Maker]],
  metric: Callable[[Any, Any], jax.Array],
  want: Any,
  not_run: dict[str, str],
) -> tuple[dict[str, fp8_arms.Run], dict[str, float]]:
  """Returns the runs whose error against `want` is within their tolerance, and all errors.

  Adds the reasons why others do not run or are not timed to `not_run`.
  """
  runs: dict[str, fp8_arms.Run] = {}
  errors: dict[str, float] = {}
  for name, tolerance, make in makers:
    try:
      run = make()
      errors[name] = float(metric(fp8_arms.as_jax(run()), want))
    except Exception as failure:  # whatever a library does on this machine, the others are compared
      not_run[name] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
      continue
    if errors[name] <= tolerance:
      runs[name] = run
    else:
      not_run[name] = f"its error is {errors[name]:.1e}, tolerance {tolerance:.0e}: not timed"
  return runs, errors


def timed(runs: dict[str, fp8_arms.Run], turns: int) -> dict[str, list[float]]:
  """Returns the seconds of every turn; the first turn warms up."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(turns + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def time_products(
  shape: tuple[int, int, int], platform: str, turns: int, found: dict[str, Any]
) -> None:
  """Adds a row for each product and arm."""
  for problem in fp8_arms.problems(*shape):
    arms = fp8_arms.product_arms(problem, platform)
    runs, errors = check(arms, relative, fp8_arms.reference(problem), found["not_run"])
    for name, seconds in timed(runs, turns).items():
      row = dict(what=problem.name, name=name, error=errors[name], seconds=seconds)
      found["products"].append(row | dict(flops=problem.flops))
      print(problem.name, name, np.median(seconds), flush=True)


def time_quantizers(
  shape: tuple[int, int, int], platform: str, turns: int, found: dict[str, Any]
) -> None:
  """Adds a row for each quantiser and a copy of what it reads."""
  for given in fp8_arms.inputs(*shape):
    want = fp8_arms.reference_codes(given)
    arms = fp8_arms.quantizer_arms(given, platform)
    runs, errors = check(arms, mismatches, want, found["not_run"])
    if given.block[0] == 1:
      rotated = fp8_arms.rotated_reference(given.x)
      rotations = fp8_arms.rotation_arms(given.x, platform)
      more_runs, more_errors = check(rotations, mismatches, rotated, found["not_run"])
      runs, errors = runs | more_runs, errors | more_errors
    moved = fp8_arms.moved_bytes(given.x, want)
    add_bandwidths(given, runs, errors, moved, turns, found)


def add_bandwidths(
  given: fp8_arms.Input,
  runs: dict[str, fp8_arms.Run],
  errors: dict[str, float],
  moved: float,
  turns: int,
  found: dict[str, Any],
) -> None:
  """Adds a row for each run, with the bytes that it has to move, and one for a copy."""
  runs = {"copy": fp8_arms.copy_arm(given.x)} | runs
  for name, seconds in timed(runs, turns).items():
    size = 2 * fp8_arms.moved_bytes(given.x) if name == "copy" else moved
    row = dict(what=given.name, name=name, error=errors.get(name, 0.0), seconds=seconds)
    found["quantizers"].append(row | dict(bytes=size))
    print(given.name, name, np.median(seconds), flush=True)


def product_table(rows: list[dict[str, Any]]) -> str:
  """Returns the products' table; the ratio is bfloat16's time over an arm's."""
  columns = ("product", "arm", "error", "ms: median (10 % - 90 %)", "TFLOP/s", "bfloat16 / this")
  lines, yardstick = [], {}
  for r in rows:
    median = float(np.median(r["seconds"]))
    yardstick.setdefault(r["what"], median)
    rate = f"{r['flops'] / median / 1e12:.4g}"
    ratio = f"{yardstick[r['what']] / median:.2f}"
    ms = spread(r["seconds"], digits=3, scale=1e3)
    lines.append([r["what"], r["name"], f"{r['error']:.1e}", ms, rate, ratio])
  return table(columns, lines)


def quantizer_table(rows: list[dict[str, Any]]) -> str:
  """Returns the quantisers' table; bandwidths count every input and result once."""
  columns = ("input", "arm", "codes that differ", "ms: median (10 % - 90 %)", "GB/s", "of a copy")
  lines, copy = [], 1.0
  for r in rows:
    rate = r["bytes"] / float(np.median(r["seconds"]))
    copy = rate if r["name"] == "copy" else copy
    ms = spread(r["seconds"], digits=3, scale=1e3)
    share = f"{rate / copy:.0%}"
    lines.append([r["what"], r["name"], f"{r['error']:.1e}", ms, f"{rate / 1e9:.1f}", share])
  return table(columns, lines)


def main() -> None:
  """Runs the comparison and writes its page and its numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shape", nargs=3, type=int, metavar=("M", "K", "N"))
  parser.add_argument("--turns", type=int, default=20)
  parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
  arguments = parser.parse_args()
  platform = jax.default_backend()
  shape = tuple(arguments.shape or (CPU_SHAPE if platform == "cpu" else GPU_SHAPE))
  found: dict[str, Any] = dict(
    date=datetime.date.today().isoformat(),
    versions={name: version(name) for name in LIBRARIES},
    hardware=hardware(),
    shape=shape,
    products=[],
    quantizers=[],
    not_run={} if platform == "gpu" else dict(NO_GPU),
  )
  time_products(shape, platform, arguments.turns, found)
  time_quantizers(shape, platform, arguments.turns, found)
  reasons = "\n".join(f"- {name}: {reason}" for name, reason in found["not_run"].items())
  body = (
    f"M x K x N = {' x '.join(map(str, shape))}, e4m3, blocks of 128; {arguments.turns} turns.\n\n"
    f"## Products\n\n{product_table(found['products'])}\n\n"
    f"## Quantisers\n\n{quantizer_table(found['quantizers'])}\n\n## Not run\n\n{reasons}"
  )
  stem = arguments.out / f"fp8_matmul_{found['hardware']}"
  publish(report("Blockwise FP8", body, *LIBRARIES), stem.with_suffix(".md"))
  stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
