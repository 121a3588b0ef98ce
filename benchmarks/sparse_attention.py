"""Times native sparse attention beside blocked dense attention, and says where it becomes faster.

    python -m benchmarks.sparse_attention [--lengths 4096 8192 16384 32768] [--out FOLDER]

Both in one process, turn by turn: the "xla" forms of `nsa_attention` at the paper's sizes (32, 16,
64, 16 blocks, window 512) and of causal `attention`, forward and with gradients, with the memory of
the compiled program. Writes sparse_attention_<hardware>.md.
"""

# B batch, T positions, N query heads, K key heads, H head width
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.table import hardware, median_ratio, publish, report, spread, table
from pallas_kernels.attention import attention
from pallas_kernels.sparse_attention import (
  BlockSizes,
  KeysValues,
  block_starts,
  compress_mean,
  nsa_attention,
)

SIZES = BlockSizes()
HEADS = dict(N=16, K=1, H=64)  # 16 query heads for each key head, as in the paper


def sparse(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
  """Attends sparsely, with mean compression and equal gates."""
  T = q_BTNH.shape[1]
  starts_BC = block_starts(T, length=SIZES.length, stride=SIZES.stride)
  blocks = (compress_mean(x, starts_BC, length=SIZES.length) for x in (k_BTKH, v_BTKH))
  pair, gates_BTNX = KeysValues(k_BTKH, v_BTKH), jnp.full((*q_BTNH.shape[:3], 3), 1 / 3)
  return nsa_attention(q_BTNH, KeysValues(*blocks), pair, pair, gates_BTNX, implementation="xla")


def dense(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
  """Attends to all earlier keys, by blocks."""
  return attention(q_BTNH, k_BTKH, v_BTKH, implementation="xla")


ARMS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "sparse": sparse}


def programs(attend: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
  """Returns the forward pass, and the one that gives output and gradients."""

  def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    o_BTNH, pull = jax.vjp(attend, q, k, v)
    return o_BTNH, *pull(o_BTNH)

  return {"forward": attend, "forward + backward": both}


def inputs(T: int) -> tuple[jax.Array, ...]:
  """Returns random q, k and v in float32."""
  keys = jax.random.split(jax.random.key(0), 3)
  counts = (HEADS["N"], HEADS["K"], HEADS["K"])
  return tuple(jax.random.normal(key, (1, T, n, HEADS["H"])) for key, n in zip(keys, counts))


def compare(T: int, turns: int) -> list[list[str]]:
  """Returns the rows of one length; the arms alternate, so that the machine's speed cancels."""
  arrays, rows = inputs(T), []
  for pass_name in ("forward", "forward + backward"):
    compiled = {
      name: jax.jit(programs(attend)[pass_name]).lower(*arrays).compile()
      for name, attend in ARMS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for program in compiled.values():
      jax.block_until_ready(program(*arrays))
    for _ in range(turns):
      for name, program in compiled.items():
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds[name].append(time.perf_counter() - start)
    memory = {
      name: program.memory_analysis().temp_size_in_bytes / 2**20
      for name, program in compiled.items()
    }
    times = [spread(seconds[name]) for name in ARMS]
    ratio = median_ratio(seconds["dense"], seconds["sparse"])
    row = [str(T), pass_name, *times, f"{ratio:.2f}", *(f"{memory[name]:,.0f}" for name in ARMS)]
    rows.append(row)
    print(row, flush=True)
  return rows


def crossing(rows: list[list[str]]) -> str:
  """Says from which length on the sparse form is faster, for each pass."""
  lines = []
  for pass_name in ("forward", "forward + backward"):
    of_pass = [(int(row[0]), float(row[4])) for row in rows if row[1] == pass_name]
    slower = [T for T, ratio in of_pass if ratio <= 1]
    faster = [T for T, _ in of_pass if T > max(slower, default=0)]
    lines.append(
      f"{pass_name}: faster from T = {min(faster)} on" if faster else f"{pass_name}: never faster"
    )
  return "; ".join(lines) + " (of the lengths above)."


def main() -> None:
  """Runs the comparison and writes its page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--out", type=Path, help="folder for sparse_attention_<hardware>.md")
  arguments = parser.parse_args()
  rows = [row for T in arguments.lengths for row in compare(T, arguments.turns)]
  units = ("dense s: median (10 % - 90 %)", "sparse s", "dense / sparse")
  page = table(("T", "what", *units, "dense temp MiB", "sparse temp MiB"), rows)
  shape = ", ".join(f"{name} {size}" for name, size in HEADS.items())
  body = f"B 1, {shape}, float32, the paper's sizes.\n\n{page}\n\n{crossing(rows)}"
  path = arguments.out and arguments.out / f"sparse_attention_{hardware()}.md"
  publish(report("Native sparse attention and dense attention", body, "jax", "jaxlib"), path)


if __name__ == "__main__":
  main()
