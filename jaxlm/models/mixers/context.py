"""Holds what every layer of one forward pass shares."""

# B batch, T positions

from __future__ import annotations

import dataclasses

import jax

from sharding.context.order import Order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Holds what every layer of one forward pass shares."""

  positions_BT: jax.Array
  """int32; [1, T] if all rows count alike; -1: padding, with a cache"""
  segment_ids_BT: jax.Array | None = None
  in_order: bool = dataclasses.field(default=False, metadata={"static": True})
  """the caller's promise that positions count up by one along each segment, in one piece"""
  order: Order = dataclasses.field(default="contiguous", metadata={"static": True})
  """which token of a row stands in which column on a mesh with context_ring"""
  key: jax.Array | None = None
  """of this step and layer, for formats that round gradients at random"""
