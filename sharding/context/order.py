"""Says which tokens of a row each rank of a ring holds, so that causal attention is balanced.

contiguous: rank r holds the r-th part of the row. The first rank sees one block, the last all.
zigzag: the row is cut into 2 R chunks; rank r holds chunk r and chunk 2 R - 1 - r, so that every
rank does the same work.
stripe: rank r holds tokens r, r + R, r + 2 R, ...; every block is about half visible.

Source: Brandon et al. 2023, arXiv 2311.09431 (stripe); zigzag as in zhuzilin/ring-flash-attention.
"""

# B batch, T tokens of a row, R ranks of the ring, C tokens of a rank
from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.checks import check, check_choice

RING, ULYSSES = "context_ring", "context_ulysses"
Order = Literal["contiguous", "zigzag", "stripe"]
ORDERS = ("contiguous", "zigzag", "stripe")


def permutation(order: Order, T: int, ring: int) -> np.ndarray:
  """Returns which token of the row stands in each column, int32 [T], for a ring of `ring` ranks.

  Rank r holds columns r * T / ring to (r + 1) * T / ring. Raises UserError where T does not divide.
  """
  check_length(order, T, ring)
  tokens_T = np.arange(T, dtype=np.int32)
  if order == "stripe":
    return tokens_T.reshape(T // ring, ring).T.reshape(T)
  if order == "zigzag":
    chunks = tokens_T.reshape(2 * ring, -1)
    return np.stack([chunks[:ring], chunks[: ring - 1 : -1]], axis=1).reshape(T)
  return tokens_T


def ring_size() -> int:
  """Returns the number of ranks of `context_ring` on the current mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(RING, 1)


def check_length(order: Order, T: int, ring: int) -> None:
  """Raises UserError unless rows of T tokens can be spread over the ring in this order."""
  check_choice("order", order, ORDERS)
  parts = 2 * ring if order == "zigzag" else ring
  rule = f"must be a multiple of {parts} for order {order!r} and a ring of {ring}"
  check(T % parts == 0, "T", T, rule)


def tokens_of_rank(order: Order, C: int, ring: int, rank: jax.Array | int) -> jax.Array:
  """Returns which C tokens of the row a rank holds, int32 [C]; the rank may be traced."""
  index_C = jnp.arange(C, dtype=jnp.int32)
  if order == "stripe":
    return rank + ring * index_C
  if order == "zigzag":
    half = C // 2
    first, second = rank * half, (2 * ring - 2 - rank) * half
    return index_C + jnp.where(index_C < half, first, second)
  return rank * C + index_C


def permute(x_BT: jax.Array, order: Order, ring: int) -> jax.Array:
  """Returns rows [B, T, ...] with their columns in this order; T must not be split over a mesh."""
  columns_T = permutation(order, x_BT.shape[1], ring)
  if np.array_equal(columns_T, np.arange(len(columns_T))):
    return x_BT
  return x_BT.at[:, columns_T].get(out_sharding=jax.typeof(x_BT).sharding)
