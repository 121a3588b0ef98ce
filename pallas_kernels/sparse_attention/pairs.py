"""Turns lists of blocks of each query into lists of queries of each block.

A pair is a query row and a block that it selected. Sorted by block and cut into chunks of at most
R pairs with one block, they make products of R * G rows with one block of keys, in which nothing
is computed that was not selected. Chunks run in a fixed order: sums are the same bits every time.
"""

# B batch, T query positions, S key positions, K key heads, I selected blocks of a query,
# P = B * K * T * I pairs, R pairs of a chunk, M chunks
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.places import Places


class Chunks(NamedTuple):
  """Holds all pairs, sorted by block, and where chunks begin."""

  row_P: jax.Array  # query row, (b * K + k) * T + t; then R entries past the last row
  place_P: jax.Array  # place of the block's first token, (b * K + k) * S + s
  first_M: jax.Array  # index of a chunk's first pair
  chunks: jax.Array  # number of chunks, which depends on the data

  def rows_of(self, chunk: jax.Array, R: int) -> tuple[jax.Array, jax.Array]:
    """Returns a chunk's query rows [R], past the last row where it has fewer, and its place."""
    first = self.first_M[chunk]
    row_R = jax.lax.dynamic_slice_in_dim(self.row_P, first, R)
    place_R = jax.lax.dynamic_slice_in_dim(self.place_P, first, R)
    return jnp.where(place_R == place_R[0], row_R, self.row_P[-1]), place_R[0]


def selected_starts(indices_BTKI: jax.Array, places: Places, S: int, block: int) -> jax.Array:
  """Returns the first token of each selected block, int32 [B, T, K, I] ascending, then S.

  Entries that name no block, blocks after the query and second entries of the same become S.
  """
  index_BTKI = jnp.where((indices_BTKI < 0) | (indices_BTKI > S // block), S, indices_BTKI * block)
  start_BTKI = jnp.minimum(index_BTKI + places.starts_BT()[..., None, None], S).astype(jnp.int32)
  start_BTKI = jnp.where(start_BTKI > places.positions_BT[..., None, None], S, start_BTKI)
  start_BTKI = jnp.sort(start_BTKI, axis=-1)
  again_BTKI = jnp.diff(start_BTKI, axis=-1, prepend=-1) == 0
  return jnp.where(again_BTKI, S, start_BTKI)


def sort_pairs(start_ZI: jax.Array, T: int, S: int) -> tuple[jax.Array, jax.Array]:
  """Returns the place of each pair's block and its query row, int32 [P], sorted by place.

  Rows of a place keep their order; pairs without a block, whose start is S, come last with the
  place after all others.
  """
  Z, I = start_ZI.shape
  row_P = jnp.repeat(jnp.arange(Z, dtype=jnp.int32), I)
  start_P = start_ZI.reshape(-1)
  place_P = jnp.where(start_P == S, Z // T * S, row_P // T * S + start_P)
  place_P, row_P = jax.lax.sort((place_P, row_P), num_keys=1, is_stable=True)
  return place_P, row_P


def make_chunks(start_BTKI: jax.Array, S: int, block: int, R: int) -> Chunks:
  """Returns the chunks of the pairs whose blocks begin at `start_BTKI`, S for none."""
  B, T, K, I = start_BTKI.shape
  place_P, row_P = sort_pairs(start_BTKI.swapaxes(1, 2).reshape(-1, I), T, S)
  at_P = jnp.arange(place_P.size, dtype=jnp.int32)
  is_new_P = jnp.diff(place_P, prepend=-1) != 0
  in_run_P = at_P - jax.lax.cummax(jnp.where(is_new_P, at_P, 0))
  begins_P = (in_run_P % R == 0) & (place_P < B * K * S)
  most = place_P.size // R + min(place_P.size, B * K * S)  # segments may begin anywhere
  (first_M,) = jnp.nonzero(begins_P, size=most, fill_value=0)
  padded = (
    jnp.pad(row_P, (0, R), constant_values=B * K * T),
    jnp.pad(place_P, (0, R), constant_values=-1),
  )
  return Chunks(*padded, first_M.astype(jnp.int32), jnp.sum(begins_P, dtype=jnp.int32))
