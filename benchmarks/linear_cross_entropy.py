"""Linear cross-entropy against materialised logits: TPU by schedule, CPU by the clock, GPU where there is one.

    python benchmarks/linear_cross_entropy.py [--out FOLDER] [--skip tpu cpu gpu]

Every comparator's loss and gradients are checked before it is timed. Writes linear_cross_entropy_<hardware>.json and
.md with versions, and with what was not run and why.
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

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.schedule.report import LIMITS, cases, row, table, versions

CPU_SHAPES = ((2048, 512, 32_768), (1024, 256, 131_072), (4096, 128, 256))
GPU_SHAPES = ((8192, 2304, 256_000),)
TURNS = 7


def materialised(embeddings_ND: jax.Array, classifier_VD: jax.Array, labels_N: jax.Array) -> jax.Array:
  """What a training loop writes without a fused loss."""
  x_NV = jnp.einsum("nd,vd->nv", embeddings_ND, classifier_VD, preferred_element_type=jnp.float32)
  target_N = jnp.take_along_axis(x_NV, labels_N[:, None], axis=1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(x_NV, axis=1) - target_N)


def fused(embeddings_ND: jax.Array, classifier_VD: jax.Array, labels_N: jax.Array) -> jax.Array:
  return linear_cross_entropy(embeddings_ND, classifier_VD, labels_N)


def inputs(N: int, D: int, V: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  e_ND = jax.random.normal(keys[0], (N, D)).astype(dtype)
  c_VD = (jax.random.normal(keys[1], (V, D)) / D**0.5).astype(dtype)
  return e_ND, c_VD, jax.random.randint(keys[2], (N,), 0, V)


def relative(got: jax.Array, want: jax.Array) -> float:
  got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return float(np.linalg.norm(got64 - want64) / np.linalg.norm(want64))


def compare(shape: tuple[int, int, int], dtype: Any, tolerance: float) -> list[dict[str, Any]]:
  """Both losses on one shape, forward and forward + backward, in alternating turns after their values agree."""
  args = inputs(*shape, dtype)
  rows = []
  for what in ("forward", "forward + backward"):
    arms = {}
    for name, loss in (("materialised", materialised), ("linear_cross_entropy", fused)):
      fn: Callable[..., Any] = loss if what == "forward" else jax.value_and_grad(loss, (0, 1))
      arms[name] = jax.jit(fn).lower(*args).compile()
    want, got = (jax.tree.leaves(compiled(*args)) for compiled in arms.values())
    errors = [relative(g, w) for g, w in zip(got, want)]
    if max(errors) > tolerance:
      raise ValueError(f"shape={shape}: {what} differs by {errors}, tolerance {tolerance}: nothing was timed")
    del want, got
    seconds = timed(arms, args)
    for name, compiled in arms.items():
      memory = compiled.memory_analysis().temp_size_in_bytes
      rows.append(
        dict(shape=shape, dtype=jnp.dtype(dtype).name, what=what, name=name, errors=errors, temp_mib=memory / 2**20)
        | {key: float(np.median(values)) for key, values in seconds[name].items()}
      )
      print(rows[-1], flush=True)
  return rows


def timed(arms: dict[str, Any], args: tuple[jax.Array, ...]) -> dict[str, dict[str, list[float]]]:
  """Wall and processor seconds of every turn; the processor's do not count other programs on the machine."""
  seconds: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in arms}
  for _ in range(TURNS):
    for name, compiled in arms.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(compiled(*args))
      seconds[name]["wall_s"].append(time.perf_counter() - wall)
      seconds[name]["cpu_s"].append(time.process_time() - cpu)
  return seconds


def timing_table(rows: list[dict[str, Any]]) -> str:
  """Two lines a shape and direction; ratios are materialised / ours, above 1: ours is faster or smaller."""
  lines = ["| N x D x V | what | loss | wall ms | processor ms | temp MiB | faster | smaller |", "|" + "---|" * 8]
  for first, second in zip(rows[::2], rows[1::2]):
    for r in (first, second):
      better = "" if r is first else f"{first['cpu_s'] / r['cpu_s']:.2f}x | {first['temp_mib'] / r['temp_mib']:.1f}x"
      shape = " x ".join(map(str, r["shape"])) + f" {r['dtype']}"
      times = f"{1e3 * r['wall_s']:.1f} | {1e3 * r['cpu_s']:.1f} | {r['temp_mib']:.1f}"
      lines.append(f"| {shape} | {r['what']} | {r['name']} | {times} | {better or ' | '} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", default=pathlib.Path(__file__).parent / "results", type=pathlib.Path)
  parser.add_argument("--skip", nargs="*", default=[], choices=["tpu", "cpu", "gpu"])
  parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e", "tpu7x"])
  arguments = parser.parse_args()
  backend = jax.default_backend()
  hardware = jax.devices()[0].device_kind.replace(" ", "_").lower() if backend != "cpu" else f"cpu{os.cpu_count()}"
  found: dict[str, Any] = dict(date=datetime.date.today().isoformat(), versions=versions(), machine=platform.platform())
  found |= dict(hardware=hardware, not_run={}, tpu_schedule=[], measured=[])
  text = [f"# Linear cross-entropy\n\n{found['date']}, {hardware}, {found['versions']}"]
  if backend == "cpu" and "cpu" not in arguments.skip:
    for shape in CPU_SHAPES:
      found["measured"] += compare(shape, jnp.float32, 2e-5)
  if backend == "gpu" and "gpu" not in arguments.skip:
    for shape in GPU_SHAPES:
      found["measured"] += compare(shape, jnp.bfloat16, 1e-2)
  if found["measured"]:
    text.append(f"## Measured, medians of {TURNS} alternating turns\n\n{timing_table(found['measured'])}")
  if "tpu" not in arguments.skip:
    chosen = [case for case in cases() if "linear_cross_entropy" in case.name]
    found["tpu_schedule"] = [row(case, chip) for chip in arguments.chips for case in chosen]
    text.append(f"## TPU by schedule\n\n{LIMITS}\n\n{table(found['tpu_schedule'])}")
  if backend != "gpu":
    found["not_run"]["H200: ours, Liger's Triton kernel, Apple's CCE"] = "no GPU on this machine"
  found["not_run"] |= {f"{name}": "skipped on request" for name in arguments.skip}
  if found["versions"]["tokamax"] == "not installed":
    found["not_run"]["tokamax's kernel"] = "not installed"
  text.append("## Not run\n\n" + "\n".join(f"- {what}: {why}" for what, why in found["not_run"].items()))
  arguments.out.mkdir(parents=True, exist_ok=True)
  stem = arguments.out / f"linear_cross_entropy_{hardware}"
  stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
  stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
  print("\n\n".join(text))


if __name__ == "__main__":
  main()
