"""Computes the decays between the positions of a chunk as products, in a TPU's vector registers.

All are products of exp(log decay) over a run of positions, built by doubling blocks, so that none
is above 1, none is a quotient, and any log decay from 0 to minus infinity is exact. Gradients go to
the log decays: that of a sum over a run is added to each of its positions by one product.
"""

# C positions of a chunk, K width of keys, L halvings of the chunk; lists hold groups of 8 rows
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_attention.tile_products import ROWS, Tables, dot, scaled, split_rows


class Decays(NamedTuple):
  """Holds decays of a chunk, float32 [8, K] for each group of 8 positions; None is 1."""

  before: list[list[Any]]
  """For each halving: from a block's middle up to and with a position behind it."""
  after: list[list[Any]]
  """For each halving: after a position before the middle up to it."""
  from_start: list[jax.Array]
  """From the chunk's start up to and with each position."""
  to_end: list[jax.Array]
  """After each position up to the chunk's end."""


def decays_of(decays: Decays | None, level: int, groups: int) -> tuple[list[Any], list[Any]]:
  """Returns the decays of a halving before and after positions, or those of no decay."""
  if decays is None:
    return [None] * groups, [None] * groups
  return decays.before[level], decays.after[level]


def multiply_decays(decay_CK: jax.Array) -> Decays:
  """Returns the decays of a chunk from its log decays.

  `before` of positions that are before a middle, and `after` of those behind it, are at most 1 and
  not to be used.
  """
  befores, afters = [], []
  before = total = split_rows(jnp.exp(decay_CK))
  after: list[Any] = [None] * len(total)
  row_8K = jax.lax.broadcasted_iota(jnp.int32, total[0].shape, 0)
  for half in (1, 2, 4):
    befores.append(before)
    afters.append(after)
    behind = row_8K & half != 0
    other = [pltpu.roll(x, half, 0) for x in total]
    if half < ROWS // 2:
      other = [jnp.where(behind, y, pltpu.roll(x, ROWS - half, 0)) for x, y in zip(total, other)]
    before = [jnp.where(behind, x * y, x) for x, y in zip(before, other)]
    after = [jnp.where(behind, 1.0 if x is None else x, scaled(y, x)) for x, y in zip(after, other)]
    total = [x * y for x, y in zip(total, other)]
  half = 1
  while half < len(total):
    befores.append(before)
    afters.append(after)
    other = [total[i // half * half ^ half] for i in range(len(total))]
    behind_of = [bool(i & half) for i in range(len(total))]
    before = [x * y if behind else x for x, y, behind in zip(before, other, behind_of)]
    after = [x if behind else x * y for x, y, behind in zip(after, other, behind_of)]
    for i in range(0, len(total), 2 * half):
      total[i] = total[i] * total[i + half]
    half = 2 * half
  return Decays(befores, afters, before, after)


def pull_decays(
  halves: list[list[jax.Array]],
  from_start: list[jax.Array],
  to_end: list[jax.Array],
  tables: Tables,
) -> jax.Array:
  """Returns the gradient of log decays [C, K], from those of the logarithms of the decays."""
  parts = [part for parts in (*halves, from_start, to_end) for part in parts]
  return dot(tables.sums[...], jnp.concatenate(parts), 1, 0, tables.dtype)
