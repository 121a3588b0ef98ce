"""Computes the decays between the positions of a chunk as products, in a TPU's vector registers.

All are products of exp(log decay) over a run of positions, built by doubling blocks, so that none
is above 1, none is a quotient, and any log decay from 0 to minus infinity is exact. Gradients go to
the log decays: that of a sum over a run is added to each of its positions by one product.
"""

# C positions of a chunk, K width of keys, L halvings of the chunk; lists hold groups of 8 rows
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_attention.tile_products import ROWS, Tables, dot, split_rows


class Decays(NamedTuple):
  """Holds decays of a chunk, float32 [8, K] for each group of 8 positions."""

  halves: list[list[jax.Array]]
  """For each halving: from a block's middle to a position behind it, or from one before it."""
  from_start: list[jax.Array]
  """From the chunk's start up to and with each position."""
  to_end: list[jax.Array]
  """After each position up to the chunk's end."""


def multiply_decays(decay_CK: jax.Array) -> Decays:
  """Returns the decays of a chunk from its log decays."""
  parts = [_inside_of_8(x_8K) for x_8K in split_rows(jnp.exp(decay_CK))]
  halves = [[part[0][level] for part in parts] for level in range(3)]
  before = [part[1] for part in parts]
  after = [part[2] for part in parts]
  total = [part[3] for part in parts]
  groups, half = len(parts), 1
  while half < groups:
    behind = [bool(i & half) for i in range(groups)]
    halves.append([before[i] if behind[i] else after[i] for i in range(groups)])
    other = [total[i // half * half ^ half] for i in range(groups)]
    before = [x * other[i] if behind[i] else x for i, x in enumerate(before)]
    after = [x if behind[i] else x * other[i] for i, x in enumerate(after)]
    for i in range(0, groups, 2 * half):
      total[i] = total[i] * total[i + half]
    half = 2 * half
  return Decays(halves, before, after)


def _inside_of_8(
  x_8K: jax.Array,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
  """Returns the decays of the halvings of 8 positions, from the start, to the end and of all."""
  row_8K = jax.lax.broadcasted_iota(jnp.int32, x_8K.shape, 0)
  halves, before, total = [], x_8K, x_8K
  after = jnp.ones_like(x_8K)
  for half in (1, 2, 4):
    behind = row_8K & half != 0
    halves.append(jnp.where(behind, before, after))
    other = pltpu.roll(total, half, 0)
    if half < ROWS // 2:
      other = jnp.where(behind, other, pltpu.roll(total, ROWS - half, 0))
    before = jnp.where(behind, before * other, before)
    after = jnp.where(behind, after, after * other)
    total = total * other
  return halves, before, after, total


def pull_decays(
  halves: list[list[jax.Array]],
  from_start: list[jax.Array],
  to_end: list[jax.Array],
  tables: Tables,
) -> jax.Array:
  """Returns the gradient of log decays [C, K], from those of the logarithms of the decays."""
  parts = [part for parts in (*halves, from_start, to_end) for part in parts]
  return dot(tables.sums[...], jnp.concatenate(parts), 1, 0, tables.dtype)
