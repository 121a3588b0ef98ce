"""Times linear cross-entropy against materialised logits and other libraries.

    python -m benchmarks.linear_cross_entropy [--out FOLDER] [--skip tpu cpu gpu]
    python -m benchmarks.linear_cross_entropy --skip tpu cpu --losses pallas_gpu --shape 512 192 640

Takes CPU and GPU by the clock and TPU by schedule. Every comparator's loss and gradients are
checked before it is timed. Writes linear_cross_entropy_<hardware>.json and .md with versions, and
with what was not run and why. A kernel that has never run on this machine may bring down the
process: `--losses` and `--shape` try it alone.
"""

# N tokens, D model, V vocabulary
from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loss_arms import Arm, arms
from benchmarks.table import hardware, publish, report, table, version
from jaxlm.run.memory import keep_freed_memory
from pallas_kernels.schedule.report import PACKAGES, cases, closing, not_run, row
from pallas_kernels.schedule.report import table as schedule_table

CPU_SHAPES = ((2048, 512, 32_768), (1024, 256, 131_072), (4096, 128, 256))
GPU_SHAPES = ((8192, 2304, 256_000),)
TURNS = 7
OTHERS = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
NO_GPU = dict.fromkeys(
  ("linear_cross_entropy, pallas_gpu", "Liger (Triton)", "Apple CCE, filtered", "Apple CCE, exact"),
  "no GPU on this machine",
)


def problem(N: int, D: int, V: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  e_ND = jax.random.normal(keys[0], (N, D)).astype(dtype)
  c_VD = (jax.random.normal(keys[1], (V, D)) / D**0.5).astype(dtype)
  return e_ND, c_VD, jax.random.randint(keys[2], (N,), 0, V)


@jax.jit
def relative(got: jax.Array, want: jax.Array) -> jax.Array:
  got, want = got.astype(jnp.float32), want.astype(jnp.float32)
  return jnp.sqrt(jnp.sum(jnp.square(got - want)) / jnp.sum(jnp.square(want)))


def compare(
  shape: tuple[int, int, int],
  device: jax.Device,
  dtype: Any,
  tolerance: float,
  losses: list[str],
  found: dict[str, Any],
) -> None:
  """Times all arms on one shape, forward and forward + backward, after their values agree.

  Adds rows to `found["measured"]`, and arms that fail or disagree to `found["not_run"]`.
  """
  with jax.default_device(device):
    inputs = problem(*shape, dtype)
    for gradient in (False, True):
      makers = select_arms(inputs, gradient, device.platform == "gpu", losses, found["not_run"])
      checked, errors = check(makers, tolerance, found["not_run"])
      seconds = timed(checked)
      for name, arm in checked.items():
        what = "forward + backward" if gradient else "forward"
        about = dict(
          shape=shape, dtype=jnp.dtype(dtype).name, device=device.platform, what=what, name=name
        )
        medians = {key: float(np.median(values)) for key, values in seconds[name].items()}
        found["measured"].append(
          about | dict(errors=errors[name], temp_mib=arm.memory() / 2**20) | medians
        )
        print(found["measured"][-1], flush=True)


def select_arms(
  inputs: Any, gradient: bool, gpu: bool, losses: list[str], left_out: dict[str, str]
) -> list[tuple[str, Callable[[], Arm]]]:
  """Returns the first arm, which others are compared with, and those that `losses` names."""
  first, *others = arms(inputs, gradient, gpu)
  chosen = [first]
  for name, make in others:
    if not losses or any(word in name for word in losses):
      chosen.append((name, make))
    else:
      left_out[name] = "not among --losses"
  return chosen


def check(
  makers: list[tuple[str, Callable[[], Arm]]], tolerance: float, failed: dict[str, str]
) -> tuple[dict[str, Arm], dict[str, list[float]]]:
  """Returns the arms that agree with the first, and their relative errors.

  Adds the reasons why others do not run or are not timed to `failed`.
  """
  checked: dict[str, Arm] = {}
  errors: dict[str, list[float]] = {}
  want = None
  for name, make in makers:
    try:
      arm = make()
      got = arm.run()
    except Exception as error:  # whatever a library does on this machine, the others are compared
      failed[name] = (
        f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
      )
      continue
    want = got if want is None else want
    errors[name] = [float(relative(g, w)) for g, w in zip(got, want, strict=True)]
    if max(errors[name]) <= tolerance:
      checked[name] = arm
    else:
      failed[name] = (
        f"relative errors of loss and gradients are {errors[name]}, "
        f"tolerance {tolerance}: not timed"
      )
  return checked, errors


def timed(checked: dict[str, Arm]) -> dict[str, dict[str, list[float]]]:
  """Returns wall and processor seconds of every turn.

  The processor's do not count other programs on the machine.
  """
  seconds: dict[str, dict[str, list[float]]] = {
    name: {"wall_s": [], "cpu_s": []} for name in checked
  }
  for _ in range(TURNS):
    for name, arm in checked.items():
      wall, cpu = time.perf_counter(), time.process_time()
      arm.run()
      seconds[name]["wall_s"].append(time.perf_counter() - wall)
      seconds[name]["cpu_s"].append(time.process_time() - cpu)
  return seconds


COLUMNS = (
  "N x D x V",
  "what",
  "loss",
  "wall ms",
  "processor ms",
  "TFLOP/s",
  "temp MiB",
  "faster",
  "smaller",
)


def timing_table(rows: list[dict[str, Any]]) -> str:
  """Returns the table; above 1, this loss is faster by the wall clock, or smaller, than the first.

  The rate counts 2NVD operations forward and 8NVD with the backward pass, whether or not the
  logits are computed twice.
  """
  lines = []
  yardsticks = {(r["shape"], r["dtype"], r["what"]): r for r in rows if r["name"] == "materialised"}
  for r in rows:
    first = yardsticks.get((r["shape"], r["dtype"], r["what"]), r)
    shape = " x ".join(map(str, r["shape"])) + f" {r['dtype']} {r['device']}"
    products = 2 if r["what"] == "forward" else 8
    rate = products * np.prod(r["shape"], dtype=float) / r["wall_s"] / 1e12
    better = ["", ""]
    if r is not first:
      faster = first["wall_s"] / r["wall_s"]
      smaller = first["temp_mib"] / max(r["temp_mib"], 0.1)
      better = [f"{faster:.2f}x", f"{smaller:.1f}x"]
    times = [f"{1e3 * r['wall_s']:.1f}", f"{1e3 * r['cpu_s']:.1f}", f"{rate:.3g}"]
    lines.append([shape, r["what"], r["name"], *times, f"{r['temp_mib']:.1f}", *better])
  return table(COLUMNS, lines)


def measure(
  skip: list[str], chips: list[str], losses: list[str], shape: tuple[int, int, int] | None
) -> dict[str, Any]:
  gpu, cpu = jax.default_backend() == "gpu", jax.devices("cpu")[0]
  versions = {name: version(name) for name in (*PACKAGES, *OTHERS)}
  found: dict[str, Any] = dict(date=datetime.date.today().isoformat(), versions=versions)
  found |= dict(machine=platform.platform(), hardware=hardware(), tpu_schedule=[], measured=[])
  found["not_run"] = {name: "skipped on request" for name in skip}
  if "gpu" not in skip and gpu:
    for sizes in (shape,) if shape else GPU_SHAPES:
      compare(sizes, jax.devices()[0], jnp.bfloat16, 1e-2, losses, found)
  elif "gpu" not in skip:
    found["not_run"] |= NO_GPU
  if "cpu" not in skip:
    for sizes in (shape,) if shape else CPU_SHAPES:
      compare(sizes, cpu, jnp.float32, 2e-5, losses, found)
  if "tpu" not in skip and found["versions"]["libtpu"] == "not installed":
    found["not_run"]["TPU by schedule"] = "libtpu is not installed"
  elif "tpu" not in skip:
    chosen = [case for case in cases() if "linear_cross_entropy" in case.name]
    found["tpu_schedule"] = [row(case, chip) for chip in chips for case in chosen]
    found["not_run"] |= not_run()
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default=pathlib.Path(__file__).parent / "results", type=pathlib.Path)
  parser.add_argument("--skip", nargs="*", default=[], choices=["tpu", "cpu", "gpu"])
  parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e", "tpu7x"])
  parser.add_argument("--losses", nargs="*", default=[], help="words of the names to compare")
  parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"))
  arguments = parser.parse_args()
  keep_freed_memory()  # as training does
  shape = tuple(arguments.shape) if arguments.shape else None
  found = measure(arguments.skip, arguments.chips, arguments.losses, shape)
  parts = []
  if found["measured"]:
    times = timing_table(found["measured"])
    parts.append(f"## Measured, medians of {TURNS} alternating turns\n\n{times}")
  if found["tpu_schedule"]:
    rows = found["tpu_schedule"]
    parts.append(f"## TPU by schedule\n\n{schedule_table(rows)}\n\n{closing(rows)}")
  reasons = "\n".join(f"- {name}: {reason}" for name, reason in found["not_run"].items())
  parts.append(f"## Not run\n\n{reasons}")
  page = report("Linear cross-entropy", "\n\n".join(parts), *PACKAGES, *OTHERS)
  stem = arguments.out / f"linear_cross_entropy_{found['hardware']}"
  publish(page, stem.with_suffix(".md"))
  stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
