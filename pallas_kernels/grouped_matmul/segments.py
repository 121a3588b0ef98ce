"""Lays rows out in segments: each group padded to whole blocks, so that no block has two groups."""

# T rows, E groups, P padded rows, S blocks of padded rows
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
  """Says where each row of each group stands in the padded layout of S blocks, P rows in all."""

  sizes_E: jax.Array
  """rows of each group, at least 0 and cut where they exceed T together"""
  place_T: jax.Array
  """padded place of each row; P for rows past the last group"""
  row_P: jax.Array
  """row at each padded place; T for padding"""
  group_S: jax.Array
  """group of each block; blocks that nobody needs are padding of the last group"""
  used: jax.Array
  """number of blocks that hold rows"""


def clip_sizes(group_sizes_E: jax.Array, T: int) -> jax.Array:
  """Returns the rows of each group: negative sizes count as 0, rows past T do not exist."""
  ends_E = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_E, 0)), T)
  return jnp.diff(ends_E, prepend=0).astype(jnp.int32)


def make_segments(group_sizes_E: jax.Array, T: int, block: int) -> Segments:
  """Returns the layout of T rows in blocks of `block` rows.

  S = T / block + min(E, T) blocks are enough for any sizes.
  """
  E = group_sizes_E.shape[0]
  blocks = T // block + min(E, T)
  sizes_E = clip_sizes(group_sizes_E, T)
  ends_E = jnp.cumsum(sizes_E)
  last_block_E = jnp.cumsum(-(-sizes_E // block))
  first_block_E = last_block_E - (-(-sizes_E // block))
  row_T = jnp.arange(T, dtype=jnp.int32)
  group_T = jnp.searchsorted(ends_E, row_T, side="right", method="compare_all")
  inside_T = row_T < ends_E[-1]
  at_T = jnp.minimum(group_T, E - 1)
  place_T = first_block_E[at_T] * block + row_T - (ends_E - sizes_E)[at_T]
  place_T = jnp.where(inside_T, place_T, blocks * block).astype(jnp.int32)
  row_P = jnp.full(blocks * block, T, jnp.int32).at[place_T].set(row_T, mode="drop")
  block_S = jnp.arange(blocks, dtype=jnp.int32)
  group_S = jnp.searchsorted(last_block_E, block_S, side="right", method="compare_all")
  group_S = jnp.minimum(group_S, E - 1).astype(jnp.int32)
  return Segments(sizes_E, place_T, row_P, group_S, last_block_E[-1].astype(jnp.int32))


def pad_rows(x_TK: jax.Array, segments: Segments) -> jax.Array:
  """Returns the rows at their padded places, zeros elsewhere: [P, K]."""
  return x_TK.at[segments.row_P].get(mode="fill", fill_value=0)


def unpad_rows(y_PN: jax.Array, segments: Segments) -> jax.Array:
  """Returns the rows from their padded places, zeros for rows past the last group: [T, N]."""
  return y_PN.at[segments.place_T].get(mode="fill", fill_value=0)
