"""Times delta attention beside dense attention by blocks, in one run, over the length.

    python -m benchmarks.delta_attention [--lengths T ...] [--turns N] [--out FOLDER]

Takes Kimi delta attention (a decay for each channel) and the gated delta rule (one for a head) as
"xla" runs them, and this project's dense causal attention. Every turn times all of them, so that
the machine's speed cancels in their ratios. What disagrees with the recurrence at the shortest
length makes the exit status 1. Writes delta_attention_<hardware>.md.
"""

# B batch, T positions, N heads, K width of keys and values
from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.table import hardware, median_ratio, publish, report, spread, table
from pallas_kernels.attention import attention
from pallas_kernels.delta_attention import gated_delta_rule, kimi_delta_attention

HEADS, WIDTH = 4, 128
DENSE = "dense attention"
TOLERANCE = 1e-4


def kimi(q, k, v, decay_BTNK, beta_BTN, implementation="xla") -> jax.Array:
  """Returns Kimi delta attention."""
  return kimi_delta_attention(q, k, v, decay_BTNK, beta_BTN, implementation=implementation)


def gated(q, k, v, decay_BTNK, beta_BTN, implementation="xla") -> jax.Array:
  """Returns the gated delta rule, with the decay of each head's first channel."""
  return gated_delta_rule(q, k, v, decay_BTNK[..., 0], beta_BTN, implementation=implementation)


def dense(q, k, v, decay_BTNK, beta_BTN) -> jax.Array:
  """Returns dense causal attention, by blocks."""
  return attention(q, k, v, implementation="xla")


ARMS: dict[str, Callable[..., jax.Array]] = {
  "Kimi delta attention": kimi,
  "gated delta rule": gated,
  DENSE: dense,
}


def inputs(T: int) -> tuple[jax.Array, ...]:
  """Returns q, k, v, decays, beta and the cotangent of the output."""
  keys = jax.random.split(jax.random.key(0), 6)
  q, k, v, x, do = (jax.random.normal(key, (1, T, HEADS, WIDTH)) for key in keys[:5])
  return q, k, v, -0.1 * jnp.abs(x), jax.random.uniform(keys[5], (1, T, HEADS)), do


def programs(attend: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
  """Returns the forward pass, and the one that gives output and gradients."""

  def forward(*arrays):
    return attend(*arrays[:-1])

  def both(*arrays):
    o, pull = jax.vjp(attend, *arrays[:-1])
    return o, *pull(arrays[-1])

  return {"forward": forward, "forward + backward": both}


def disagreement(name: str, arrays: tuple[jax.Array, ...]) -> float:
  """Returns the largest relative error of output and gradients against the recurrence."""
  run = programs(ARMS[name])["forward + backward"]
  reference = functools.partial(ARMS[name], implementation="reference")
  want = jax.jit(programs(reference)["forward + backward"])(*arrays)
  errors = [
    jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(jax.jit(run)(*arrays), want)
  ]
  return float(jnp.max(jnp.stack(errors)))


def measure(T: int, turns: int) -> list[list[str]]:
  """Returns one row for each arm and pass at one length."""
  arrays, rows = inputs(T), []
  for what in ("forward", "forward + backward"):
    compiled = {
      name: jax.jit(programs(attend)[what]).lower(*arrays).compile()
      for name, attend in ARMS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(turns + 1):
      for name, program in compiled.items():
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        if turn:  # the first warms up
          seconds[name].append(time.perf_counter() - start)
    for name, program in compiled.items():
      memory = program.memory_analysis().temp_size_in_bytes / 2**20
      ratio = median_ratio(seconds[DENSE], seconds[name])
      row = [str(T), what, name, spread(seconds[name], scale=1e3), f"{memory:,.0f}", f"{ratio:.2f}"]
      print(row, flush=True)
      rows.append(row)
  return rows


def main() -> None:
  """Runs the comparison and writes its page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--out", type=Path, help="folder for delta_attention_<hardware>.md")
  arguments = parser.parse_args()
  small = inputs(min(256, *arguments.lengths))
  errors = {name: disagreement(name, small) for name in ARMS if name != DENSE}
  print(errors, flush=True)
  rows = [row for T in arguments.lengths for row in measure(T, arguments.turns)]
  columns = ("T", "what", "arm", "ms: median (10 % - 90 %)", "temp MiB", "dense / this")
  lines = [f"- {name}: {error:.1e} from the recurrence" for name, error in errors.items()]
  body = (
    f"B 1, N {HEADS}, K = V = {WIDTH}, float32, chunks of 64.\n\n"
    + "\n".join(lines)
    + f"\n\n{table(columns, rows)}"
  )
  path = arguments.out and arguments.out / f"delta_attention_{hardware()}.md"
  publish(report("Delta attention", body, "jax", "jaxlib"), path)
  sys.exit(max(errors.values()) > TOLERANCE)


if __name__ == "__main__":
  main()
