"""Inverts unit lower triangular tiles with a matrix unit."""

# C positions of a chunk
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.tile_products import (
  ROWS,
  Steps,
  Tables,
  dot,
  rows_behind,
  split_rows,
)


def invert_unit_lower(lowers: list[list[jax.Array]], tables: Tables) -> Steps:
  """Returns (I + L)^-1 [C, C] of each L, given by groups of 8 rows; yields between products.

  Inverses of halves are joined: below them is - X_1 L_10 X_0. Powers of L, which may overflow, are
  not needed. Inside of blocks of 8 the left operand is the blocks side by side, 8 rows in all.
  """
  C, dtype, levels = tables.level_CC.shape[0], tables.dtype, tables.levels
  groups = range(C // ROWS)
  level = split_rows(tables.level_CC)
  block_8C = jax.lax.broadcasted_iota(jnp.int32, (ROWS, C), 1) // ROWS

  def spread(packed_8C: jax.Array) -> list[jax.Array]:
    return [jnp.where(block_8C == i, packed_8C, 0.0) for i in groups]

  def joined(lower: list[jax.Array], at: int, rows: list[int]) -> jax.Array:
    zeros = jnp.zeros_like(lower[0])
    parts = [jnp.where(level[i] == at, lower[i], 0.0) if i in rows else zeros for i in groups]
    return jnp.concatenate(parts)

  inverses = []
  for lower in lowers:
    packed_8C = sum(jnp.where(block_8C == i, lower[i], 0.0) for i in groups)
    packed_8C = jnp.where(tables.level_8C == 0, -packed_8C, 0.0)
    inverses.append(packed_8C + jnp.where(tables.level_8C == levels, 1.0, 0.0))
  for at in (1, 2):
    products = [
      dot(packed_8C, joined(lower, at, list(groups)), 1, 0, dtype)
      for packed_8C, lower in zip(inverses, lowers)
    ]
    yield
    inverses = [
      packed_8C - dot(product_8C, jnp.concatenate(spread(packed_8C)), 1, 0, dtype)
      for packed_8C, product_8C in zip(inverses, products)
    ]
    yield
  rows_of = [spread(packed_8C) for packed_8C in inverses]
  for at in range(3, levels):
    behind = rows_behind(at, C // ROWS)
    products = [
      dot(jnp.concatenate([rows[i] for i in behind]), joined(lower, at, behind), 1, 0, dtype)
      for rows, lower in zip(rows_of, lowers)
    ]
    yield
    for rows, product in zip(rows_of, products):
      below = split_rows(dot(product, jnp.concatenate(rows), 1, 0, dtype))
      for i, below_8C in zip(behind, below):
        rows[i] = rows[i] - below_8C
    yield
  return [jnp.concatenate(rows) for rows in rows_of]
