"""Attends to a window of keys by blocks as long as the window, where no fused kernel runs."""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values,
# W queries of a block, X blocks
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import api as dense
from pallas_kernels.attention import attention, mask, xla
from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.sparse_attention import nonfinite
from pallas_kernels.sparse_attention.places import Options, make_places, segment_firsts


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  positions_BT: jax.Array | None,
  segment_ids_BS: jax.Array | None,
  *,
  options: Options,
  implementation: dense.Implementation | None,
) -> tuple[jax.Array]:
  """Returns the output [B, T, N, U] over the last `window` keys of each query's segment."""
  v_BSKU, bad_BSK = nonfinite.hide(v_BSKU)
  arrays = (q_BTNH, k_BSKH, v_BSKU, positions_BT, segment_ids_BS)
  o_BTNU = _attend(*arrays, options, implementation)
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  places = make_places(T, S, positions_BT, segment_ids_BS)
  end_BT = jnp.clip(places.positions_BT + 1, 0, S)
  first_BT = jnp.maximum(places.starts_BT(), end_BT - options.sizes.window)
  return (nonfinite.mark(o_BTNU, bad_BSK, first_BT, end_BT),)


def _attend(q_BTNH, k_BSKH, v_BSKU, positions_BT, segment_ids_BS, options, implementation):
  T, S, window = q_BTNH.shape[1], k_BSKH.shape[1], options.sizes.window
  names: dict[str, Any] = {
    "window": window,
    "scale": options.scale,
    "implementation": implementation,
  }
  tokens = mask.Tokens(q_segment_ids_BT=segment_ids_BS, k_segment_ids_BS=segment_ids_BS)
  shown = mask.Options(causal=True, window=window, cap=None, scale=options.scale)
  if positions_BT is not None or T != S:
    return _attend_anywhere(q_BTNH, k_BSKH, v_BSKU, positions_BT, segment_ids_BS, names)
  chosen = dense.choose(implementation, q_BTNH, k_BSKH, v_BSKU, tokens, shown, False)
  if chosen != "xla" or T <= 2 * window:
    return attention(q_BTNH, k_BSKH, v_BSKU, q_segment_ids_BT=segment_ids_BS, **names)
  return _attend_by_blocks(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, shown)


def _attend_anywhere(q_BTNH, k_BSKH, v_BSKU, positions_BT, segment_ids_BS, names):
  """Attends from any positions: those of another segment are seen as another segment's keys."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  if positions_BT is None:
    positions_BT = jnp.arange(S - T, S, dtype=jnp.int32)[None]
  segments: dict[str, Any] = {}
  if segment_ids_BS is not None:
    rows = max(positions_BT.shape[0], segment_ids_BS.shape[0])
    at_BT = jnp.broadcast_to(jnp.clip(positions_BT, 0, S - 1), (rows, T))
    ids_BS = jnp.broadcast_to(segment_ids_BS, (rows, S))
    segments["q_segment_ids_BT"] = jnp.take_along_axis(ids_BS, at_BT, axis=1)
    segments["k_segment_ids_BS"] = ids_BS
  return attention(q_BTNH, k_BSKH, v_BSKU, q_positions_BT=positions_BT, **segments, **names)


def _attend_by_blocks(q_BTNH, k_BTKH, v_BTKU, segment_ids_BT, options):
  """Attends by blocks of a window's length, each to its own keys and to those of the one before."""
  B, T = q_BTNH.shape[:2]
  W = options.window
  X = round_up(T, W) // W

  def blocks(x: jax.Array) -> jax.Array:
    return pad_axis(x, X * W, 1).reshape(x.shape[0], X, W, *x.shape[2:])

  def with_block_before(x: jax.Array, fill: int = 0) -> jax.Array:
    before = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return merge(jnp.concatenate([before, x], axis=2))

  def merge(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])

  if segment_ids_BT is None:
    ids_BXW = jnp.zeros((B, X, W), jnp.int32)
  else:
    ids_BXW = blocks(jnp.broadcast_to(segment_firsts(segment_ids_BT), (B, T)))
  tokens = mask.Tokens(
    q_segment_ids_BT=merge(ids_BXW), k_segment_ids_BS=with_block_before(ids_BXW, -1)
  )
  arrays = (
    merge(blocks(q_BTNH)),
    with_block_before(blocks(k_BTKH)),
    with_block_before(blocks(v_BTKU)),
  )
  o = xla.attend(*arrays, tokens, options, False, keeps=False)[0]
  return o.reshape(B, X * W, *o.shape[2:])[:, :T]
