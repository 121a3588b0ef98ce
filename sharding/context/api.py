"""Attends to rows that lie over several devices, on meshes with Explicit axes."""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.api import FUSED, FUSED_ON, Implementation
from pallas_kernels.attention.checks import check_arrays, check_spread_alike, check_tokens
from pallas_kernels.attention.mask import Tokens
from pallas_kernels.common.checks import check, check_choice, check_shape
from pallas_kernels.common.platform import platform
from pallas_kernels.common.shards import Axes, check_not_sharded, run_on_shards, sharded_axes
from sharding.context.hybrid import hybrid_attention_shard
from sharding.context.order import ORDERS, RING, ULYSSES, Order
from sharding.context.parts import Rows, Variant, attend_to_rows
from sharding.context.ring import ring_attention_shard
from sharding.context.ulysses import ulysses_attention_shard
from sharding.rules import manual_axes


def hybrid_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  *,
  positions_BT: jax.Array | None = None,
  segment_ids_BT: jax.Array | None = None,
  causal: bool = True,
  window: int | None = None,
  cap: float | None = None,
  scale: float | None = None,
  order: Order = "zigzag",
  implementation: Implementation | None = None,
) -> jax.Array:
  """Returns softmax attention [B, T, N, U] of rows whose T lies over several devices.

  Inside `jax.shard_map` over all axes the inputs are a device's shards, positions and segment ids
  those of whole rows. Elsewhere the types of the inputs say how they lie on the mesh: B over any
  axes, heads over any other, T over `context_ring` (keys and values travel round a ring),
  `context_ulysses` (shards of rows are swapped for shards of heads), both, or whole. The output
  lies like the queries. Values, masking and gradients are those of `pallas_kernels.attention`.

  Args:
    q_BTNH: queries [B, T, N, H]; k_BTKH and v_BTKU of the same T, with N / K neighbouring query
      heads to each of K key heads, spread alike.
    positions_BT: integers [B or 1, T], in any order, which then alone decide what is visible. By
      default the columns of the arrays stand where `order` says, and the ring leaves out what
      nobody sees.
    segment_ids_BT: integers [B or 1, T]; by default all tokens are of one segment.
    order: which token of the row stands in which column (`order.permutation`, for as many ranks as
      `context_ring` has). "zigzag" is balanced under `causal`; on a ring of one it is the row's own
      order, as all are.
    implementation: of the attention on each device, None for its best. Parts of rows, which more
      than one rank has, are "xla"'s alone.

  Raises:
    UserError: what cannot be split (T, N or K, with the number of parts), and misfits.
    UnsupportedError: T over other axes, H or U over any, another implementation named for a ring.

  Source: USP, arXiv 2405.07719; Ulysses arXiv 2309.14509; ring attention arXiv 2310.01889.
  """
  q_BTNH, k_BTKH, v_BTKU = jnp.asarray(q_BTNH), jnp.asarray(k_BTKH), jnp.asarray(v_BTKU)
  B, T = q_BTNH.shape[:2]
  check_shape("k_BTKH", k_BTKH, (B, T, None, None))
  check_arrays(q_BTNH, k_BTKH, v_BTKU)
  check_choice("order", order, ORDERS)
  variant = Variant(
    causal=causal,
    window=window,
    cap=cap,
    scale=scale,
    order=order,
    implementation=implementation,
  )
  rows = Rows(positions_BT, segment_ids_BT)
  if length := manual_axes("length"):
    return _FORMS[length](q_BTNH, k_BTKH, v_BTKU, rows, variant)
  tokens = Tokens(q_positions_BT=positions_BT, q_segment_ids_BT=segment_ids_BT)
  tokens = check_tokens(jax.tree.map(jnp.asarray, tokens), B, T, T, causal)
  batch, length, heads = _spread(q_BTNH, k_BTKH, v_BTKU)
  if not length:
    return attend_to_rows(q_BTNH, k_BTKH, v_BTKU, rows, variant)

  def local(q_BTNH, k_BTKH, v_BTKU, *rows):
    return _FORMS[length](q_BTNH, k_BTKH, v_BTKU, Rows(*rows), variant)

  whole = (tokens.q_positions_BT, tokens.q_segment_ids_BT)
  whole_rows = [batch if array is not None and array.shape[0] > 1 else () for array in whole]
  layouts = (*((batch, length, heads, ()),) * 3, *((axes, ()) for axes in whole_rows))
  out_specs = P(batch or None, length, heads or None)
  fused = RING not in length and (implementation or FUSED_ON.get(platform())) in FUSED
  # the library's kernels do not say over which mesh axes their outputs vary
  arrays = (q_BTNH, k_BTKH, v_BTKU, *whole)
  return run_on_shards(local, arrays, layouts, out_specs, check_vma=not fused)


_FORMS: dict[Axes, Callable[..., jax.Array]] = {
  (RING,): ring_attention_shard,
  (ULYSSES,): ulysses_attention_shard,
  (RING, ULYSSES): hybrid_attention_shard,
}


def ring_attention(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, **arguments: Any
) -> jax.Array:
  """Does what `hybrid_attention` does, for rows that lie over `context_ring` alone.

  Raises UserError where T lies over other axes, or over none.
  """
  _check_length_axes(q_BTNH, (RING,))
  return hybrid_attention(q_BTNH, k_BTKH, v_BTKU, **arguments)


def ulysses_attention(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, **arguments: Any
) -> jax.Array:
  """Does what `hybrid_attention` does, for rows that lie over `context_ulysses` alone.

  Columns stand in the row's own order: any `order` of a ring of one is that. Raises UserError where
  T lies over other axes, or over none.
  """
  _check_length_axes(q_BTNH, (ULYSSES,))
  return hybrid_attention(q_BTNH, k_BTKH, v_BTKU, **arguments)


def _check_length_axes(q_BTNH: jax.Array, wanted: Axes) -> None:
  rule = f"its T={q_BTNH.shape[1]} must lie over {wanted}"
  check(sharded_axes(q_BTNH, 1) == wanted, "q_BTNH", str(jax.typeof(q_BTNH)), rule)


def _spread(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array) -> tuple[Axes, Axes, Axes]:
  """Returns the mesh axes of batch, length and heads; raises where they cannot be used."""
  batch, length, heads = (sharded_axes(q_BTNH, dimension) for dimension in range(3))
  if length not in _FORMS:
    check_not_sharded("q_BTNH", q_BTNH, 1)
  check_not_sharded("q_BTNH", q_BTNH, 3)
  for name, array in (("k_BTKH", k_BTKH), ("v_BTKU", v_BTKU)):
    check_spread_alike(name, array, (batch, length, heads))
    check_not_sharded(name, array, 3)
  return batch, length, heads
