"""Records what a call attends to, and what of another rank's shard is visible in a ring."""

# B batch, T positions of a shard, S positions of the whole row, C positions of a part,
# N query heads, K key heads, H width of queries and keys, U width of values
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.attention.api import Implementation
from pallas_kernels.attention.mask import Options, Tokens
from sharding.context.order import Order, tokens_of_rank

_ALL = slice(None)


class Rows(NamedTuple):
  """Holds what is known of whole rows, in the order in which the ring holds them."""

  positions_BS: jax.Array | None = None
  segment_ids_BS: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """Holds the arguments of `hybrid_attention` that are no arrays."""

  causal: bool = True
  window: int | None = None
  cap: float | None = None
  scale: float | None = None
  order: Order = "zigzag"
  implementation: Implementation | None = None


def attend_to_rows(
  q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, rows: Rows, variant: Variant
) -> jax.Array:
  """Returns attention [B, S, N, U] of whole rows in their own order."""
  return attention(
    q_BSNH,
    k_BSKH,
    v_BSKU,
    q_positions_BT=rows.positions_BS,
    k_positions_BS=rows.positions_BS,
    q_segment_ids_BT=rows.segment_ids_BS,
    causal=variant.causal,
    window=variant.window,
    cap=variant.cap,
    scale=variant.scale,
    implementation=variant.implementation,
  )


class Part(NamedTuple):
  """Says which queries of a rank meet which keys of another, and how they are masked."""

  queries: slice
  keys: slice
  options: Options
  by_position: bool  # False: all queries are later than all keys, or the two shards are one


class Plan(NamedTuple):
  """Holds what is static in one call."""

  options: Options
  order: Order
  axis: str


def own_part(plan: Plan, given: bool) -> Part:
  """Returns how a rank's queries meet its own keys, which stand in ascending order."""
  in_order = not given and (plan.options.window is None or plan.order == "contiguous")
  return Part(_ALL, _ALL, plan.options, by_position=plan.options.causal and not in_order)


def visible_parts(plan: Plan, T: int, given: bool) -> list[Part | None]:
  """Returns what may be visible of another rank's shard; `choose_part` chooses one of them.

  None stands for nothing. Under a window all is masked by position. `given`: the caller gave
  positions, which may be in any order.
  """
  options, windowed = plan.options, plan.options.window is not None
  if not options.causal:
    return [Part(_ALL, _ALL, options, by_position=False)]
  if given or plan.order == "stripe":
    return [Part(_ALL, _ALL, options, by_position=True)]
  if not windowed:
    options = dataclasses.replace(options, causal=False)
  if plan.order == "contiguous":
    return [Part(_ALL, _ALL, options, windowed), None]
  earlier = Part(_ALL, slice(T // 2), options, windowed)
  later = Part(slice(T // 2, None), _ALL, options, windowed)
  return [earlier, later, *([None] if windowed else [])]


def choose_part(plan: Plan, T: int, source: jax.Array) -> jax.Array:
  """Returns the index in `visible_parts` of what this rank sees of the shard of rank `source`."""
  rank = jax.lax.axis_index(plan.axis)
  C = T if plan.order == "contiguous" else T // 2
  least_distance = (abs(rank - source) - 1) * C + 1
  near = plan.options.window is None or least_distance < plan.options.window
  if plan.order == "contiguous":
    return jnp.where((source < rank) & near, 0, 1)
  return jnp.where(near, jnp.where(source < rank, 0, 1), 2)


def tokens_of_part(part: Part, rows: Rows, plan: Plan, T: int, source: jax.Array) -> Tokens:
  """Returns positions and segments of this rank's queries and the source's keys in this part."""
  rank, ring = jax.lax.axis_index(plan.axis), jax.lax.axis_size(plan.axis)

  def shard_of(rows_BS: jax.Array | None, rank: jax.Array, index: slice) -> jax.Array | None:
    if rows_BS is None:
      return None
    return jax.lax.dynamic_slice_in_dim(rows_BS, rank * T, T, axis=1)[:, index]

  def positions(rank: jax.Array, index: slice) -> jax.Array | None:
    if not part.by_position:
      return None
    if rows.positions_BS is not None:
      return shard_of(rows.positions_BS, rank, index)
    return tokens_of_rank(plan.order, T, ring, rank)[None, index]

  return Tokens(
    positions(rank, part.queries),
    positions(source, part.keys),
    shard_of(rows.segment_ids_BS, rank, part.queries),
    shard_of(rows.segment_ids_BS, source, part.keys),
  )
