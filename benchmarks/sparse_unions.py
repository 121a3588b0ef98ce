"""Counts the blocks that neighbouring queries select together, at 65,536 tokens.

    python -m benchmarks.sparse_unions [--write FILE]

The TPU kernels of selected attention multiply a query block with the union of its queries' blocks.
Queries and keys are random walks that forget their past in so many tokens, or independent; the
selection is that of native sparse attention at the paper's sizes. A kernel's step sorts its 64
query blocks of 8 queries by their unions and works on 8 at a time until the longest is done, in
tiles of 4 blocks; the tiles from the first that holds a query's own block on compare positions.
"""

# T positions, G heads of a group, H head width, C compressed blocks, I blocks of a query,
# Q queries of a query block
from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.table import publish, report, table
from pallas_kernels.sparse_attention import BlockSizes, block_starts, compress_mean, nsa_select

T, G, H = 65_536, 16, 128
SIZES = BlockSizes()
QUERIES = (1, 4, 8, 16, 32, 64)
STEPS, STEP = 16, 512  # steps, evenly over the positions, and queries of one
MEMORIES = (200, 50, 10, 0)  # tokens; 0: independent


def walk(rng: np.random.Generator, shape: tuple[int, ...], memory: int) -> np.ndarray:
  """Returns numbers of variance 1 whose correlation along the first axis is exp(-n / memory)."""
  x = rng.normal(size=shape).astype(np.float32)
  keep = np.exp(-1 / memory) if memory else 0.0
  for t in range(1, shape[0]):
    x[t] = keep * x[t - 1] + np.sqrt(1 - keep**2) * x[t]
  return x


def selections(memory: int) -> np.ndarray:
  """Returns the blocks of each query of some steps, [STEPS, STEP, I]."""
  rng = np.random.default_rng(0)
  k_1T1H = jnp.asarray(walk(rng, (T, H), memory))[None, :, None]
  starts_BC = block_starts(T, length=SIZES.length, stride=SIZES.stride)
  k_1C1H = compress_mean(k_1T1H, starts_BC, length=SIZES.length)
  select = jax.jit(lambda q, positions: nsa_select(q, k_1C1H, k_1C1H, positions_BT=positions)[2])
  lists = []
  for step in range(T // STEP // STEPS // 2, T // STEP, T // STEP // STEPS):
    q_1TGH = walk(rng, (STEP, G, H), memory)[None]
    positions_1T = STEP * step + jnp.arange(STEP, dtype=jnp.int32)[None]
    lists.append(select(q_1TGH, positions_1T)[0, :, 0])
  return np.asarray(lists)


def union_sizes(lists: np.ndarray, Q: int) -> np.ndarray:
  """Returns the number of different blocks of each Q queries, [STEPS, STEP / Q]."""
  blocks = lists.reshape(lists.shape[0], -1, Q * lists.shape[2])
  return np.array([[len(set(block.tolist()) - {-1}) for block in step] for step in blocks])


def tiles_of_groups(lists: np.ndarray) -> tuple[float, float]:
  """Returns a group's tiles that compare no positions, and those that do, on average."""
  sizes = np.sort(union_sizes(lists, 8), axis=1).reshape(-1, 8)
  tiles, plain = -(-sizes.max(axis=1) // 4), (sizes.min(axis=1) - 1) // 4
  return float(np.mean(plain)), float(np.mean(tiles - plain))


def main() -> None:
  """Prints the table, or writes it as a page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", type=Path)
  arguments = parser.parse_args()
  rows = []
  for memory in MEMORIES:
    lists = selections(memory)
    sizes = [f"{union_sizes(lists, Q).mean():.1f}" for Q in QUERIES]
    tiles = (f"{count:.1f}" for count in tiles_of_groups(lists))
    rows.append([str(memory) if memory else "independent", *sizes, *tiles])
  names = [f"union of {Q}" if Q > 1 else "one query" for Q in QUERIES]
  page = table(("tokens of memory", *names, "plain tiles of 8 x 8", "with positions"), rows)
  steps = f"{STEPS} steps of {STEP} queries, evenly over the positions"
  body = f"T {T}, {G} heads of a group, width {H}, {steps}.\n\n{page}"
  publish(report("Unions of selected blocks", body, "jax", "jaxlib"), arguments.write)


if __name__ == "__main__":
  main()
