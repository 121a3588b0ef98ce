"""Makes the lists that the TPU kernels follow: blocks of a block of queries, and the other way.

A union is the set of blocks that the queries of one query block selected, with a bit for each query
that says whether it selected the block. Lists are as long as the worst case, so that nothing
overflows, and say how many of their entries count.
"""

# B batch, K key heads, T query positions, S key positions, I selected blocks of a query,
# A = B * K, Q queries of a query block, X query blocks, U entries of a union, W = Q / 32 words of
# bits, J blocks of keys
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.sparse_attention.places import Places

HEAD = 3  # numbers at the head of a union's row: count, full, order
ROW = 1024  # integers of a row of the inverted list, which is copied as a whole


class Unions(NamedTuple):
  """Holds the union of each query block, by the first token of its blocks, ascending."""

  start_AXU: jax.Array  # S after the last entry
  bits_AXUW: jax.Array  # bit q % 32 of word q // 32: query q of the block selected it
  full_AX: jax.Array  # number of leading entries that end before the first query

  @property
  def count_AX(self) -> jax.Array:
    """Returns the number of entries of each union."""
    return jnp.sum(jnp.any(self.bits_AXUW != 0, axis=-1), axis=-1, dtype=jnp.int32)

  def rows(self, stacked: int, step: int) -> jax.Array:
    """Returns [A * X, 1, HEAD + U (1 + W)]: count, full, order, the starts, the bits; 0 after them.

    U is rounded up to tiles of `stacked` entries, and one more, which kernels read ahead. The order
    of the i-th row of a grid step of `step` query blocks is the number in the step of the one with
    the i-th shortest union, so that a kernel works at one time on blocks that end together.
    """
    A, X, U = self.start_AXU.shape
    size = round_up(U, stacked) + stacked
    selected_AXU = jnp.any(self.bits_AXUW != 0, axis=-1)
    start_AXU = pad_axis(jnp.where(selected_AXU, self.start_AXU, 0), size, 2)
    bits = pad_axis(self.bits_AXUW, size, 2).reshape(A, X, -1)
    order_AX = jnp.argsort(self.count_AX.reshape(A, -1, step), axis=-1).reshape(A, X)
    head = jnp.stack([self.count_AX, self.full_AX, order_AX], axis=-1)
    return jnp.concatenate([head, start_AXU, bits], axis=-1).reshape(A * X, 1, -1)


class Inverse(NamedTuple):
  """Holds the query blocks of each block of keys, sorted by the first token of the entry."""

  rows: jax.Array  # [A * rows, 1, ROW]: entries of query block, start and W words
  first_AJ: jax.Array  # first entry that touches a block of keys
  last_AJ: jax.Array  # and the one after the last


def entries_of_row(W: int) -> int:
  """Returns how many entries a row of the inverted list holds."""
  return ROW // (2 + W)


def make_unions(
  start_BTKI: jax.Array, places: Places, S: int, block: int, Q: int, X: int
) -> Unions:
  """Returns the unions of X blocks of Q queries, from the first tokens of each query's blocks."""
  B, _, K, I = start_BTKI.shape
  W = -(-Q // 32)
  start_AXE = pad_axis(start_BTKI, X * Q, 1, S).transpose(0, 2, 1, 3).reshape(B * K, X, Q * I)
  query_E = jnp.repeat(jnp.arange(Q, dtype=jnp.int32), I)
  query_AXE = jnp.broadcast_to(query_E[None, None], start_AXE.shape)
  start_AXE, query_AXE = jax.lax.sort((start_AXE, query_AXE), num_keys=1, is_stable=True)
  # each query is in a run at most once: the sum of its bits, modulo 2^32, is their union
  word_AXEW = query_AXE[..., None] // 32 == jnp.arange(W, dtype=jnp.int32)[None, None, None]
  bit_AXEW = jnp.where(word_AXEW, jnp.left_shift(1, query_AXE % 32)[..., None], 0)
  total_AXEW = jnp.cumsum(bit_AXEW, axis=2, dtype=jnp.int32)
  ends_AXE = jnp.diff(start_AXE, axis=-1, append=-1) != 0
  # ends of runs first, in order; a run's bits are the difference of two totals
  key_AXE = jnp.where(ends_AXE, start_AXE, S)
  order = jax.lax.sort(
    (key_AXE, *(total_AXEW[..., w] for w in range(W))), num_keys=1, is_stable=True
  )
  start_AXU, total_AXUW = order[0], jnp.stack(order[1:], axis=-1)
  bits_AXUW = jnp.diff(total_AXUW, axis=2, prepend=0)
  bits_AXUW = jnp.where((start_AXU < S)[..., None], bits_AXUW, 0)
  positions_BT = pad_axis(places.positions_BT, X * Q, 1, S)
  seeing_BT = jnp.where(positions_BT < 0, S, positions_BT)
  first_BX = jnp.min(seeing_BT.reshape(-1, X, Q), axis=-1)
  first_AX = jnp.repeat(jnp.broadcast_to(first_BX, (B, X)), K, axis=0)
  full_AXU = start_AXU + (block - 1) <= first_AX[..., None]
  full_AX = jnp.sum(full_AXU & (start_AXU < S), axis=-1, dtype=jnp.int32)
  return Unions(start_AXU, bits_AXUW, full_AX)


def invert(unions: Unions, S: int, block: int) -> Inverse:
  """Returns the query blocks of each block of keys; entries touch the block where they overlap."""
  (A, X, U), W = unions.start_AXU.shape, unions.bits_AXUW.shape[-1]
  E = entries_of_row(W)
  at_AXU = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32)[None, :, None], (A, X, U))
  columns = (unions.start_AXU, at_AXU, *(unions.bits_AXUW[..., w] for w in range(W)))
  columns = tuple(column.reshape(A, X * U) for column in columns)
  start_AP, at_AP, *bits = jax.lax.sort(columns, num_keys=1, is_stable=True)
  entries = jnp.stack([at_AP, start_AP, *bits], axis=-1)
  size = round_up(X * U, E)
  entries = pad_axis(entries, size, 1).reshape(A * size // E, 1, E * (2 + W))
  first_J = jnp.arange(0, S, block, dtype=jnp.int32)
  search = jax.vmap(jnp.searchsorted, in_axes=(0, None))
  first_AJ = search(start_AP, first_J - (block - 1)).astype(jnp.int32)
  last_AJ = search(start_AP, jnp.minimum(first_J + block, S)).astype(jnp.int32)
  return Inverse(pad_axis(entries, ROW, 2), first_AJ, last_AJ)
