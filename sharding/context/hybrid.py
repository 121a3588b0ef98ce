"""Combines both: Ulysses inside each rank of a ring (USP, arXiv 2405.07719)."""

# B batch, T positions of a shard, S positions of the whole row, N query heads, K key heads,
# H width of queries and keys, U width of values
from __future__ import annotations

import jax

from sharding.context.parts import Rows, Variant
from sharding.context.ring import ring_attention_shard
from sharding.context.ulysses import swap_to_heads, swap_to_length


def hybrid_attention_shard(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  rows: Rows,
  variant: Variant,
) -> jax.Array:
  """Returns attention of this device's shards, inside shard_map over both axes.

  Device (r, i) holds the i-th part of what rank r of the ring holds in the order of the ring. The
  all-to-alls within a rank bring its part of the row together, and the rings of all i run side by
  side, each with its own heads. With an axis of size 1 this is the other form alone.
  """
  shards = swap_to_heads(q_BTNH, k_BTKH, v_BTKU)
  return swap_to_length(ring_attention_shard(*shards, rows, variant))
