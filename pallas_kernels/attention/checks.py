"""Refuses what no implementation of attention can do, and records its checked options."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries and keys, U width of values
from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Options, Tokens
from pallas_kernels.common.checks import check, check_dtype, check_number, check_shape
from pallas_kernels.common.shards import Axes, sharded_axes


def check_arrays(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array) -> None:
  """Raises UserError for ranks, sizes and dtypes that do not fit."""
  for name, array in (("q_BTNH", q_BTNH), ("k_BSKH", k_BSKH), ("v_BSKU", v_BSKU)):
    check_shape(name, array, (None,) * 4)
    check_dtype(name, array, jnp.floating)
    rule = f"must be that of q_BTNH, {q_BTNH.dtype}"
    check(array.dtype == q_BTNH.dtype, f"{name}.dtype", str(array.dtype), rule)
    check(min(array.shape[2:]) >= 1, f"{name}.shape", array.shape, "needs a head and a width")
  B, _, N, H = q_BTNH.shape
  _, S, K, _ = k_BSKH.shape
  check_shape("k_BSKH", k_BSKH, (B, None, None, H))
  check_shape("v_BSKU", v_BSKU, (B, S, K, None))
  check(N % K == 0, "q_BTNH.shape", q_BTNH.shape, f"its N={N} must be a multiple of K={K}")


def check_tokens(tokens: Tokens, B: int, T: int, S: int, causal: bool) -> Tokens:
  """Returns the tokens with what a missing array stands for; raises UserError for misfits.

  Key positions default to 0 .. S - 1, and key segments to those of the queries.
  """
  sizes = (T, S, T, S)
  for name, array, size in zip(Tokens._fields, tokens, sizes):
    if array is not None:
      check_dtype(name, array, jnp.integer)
      rows = array.shape[0] if array.ndim == 2 else None
      check_shape(name, array, (1 if rows == 1 else B, size))
  q_positions, k_positions, q_segments, k_segments = tokens
  rule = "give the positions of the queries, q_positions_BT, too"
  check(k_positions is None or q_positions is not None, "q_positions_BT", None, rule)
  rule = "positions only decide what is causal: leave them out with causal=False"
  check(q_positions is None or causal, "causal", causal, rule)
  rule = "give the segments of the queries, q_segment_ids_BT, too"
  check(k_segments is None or q_segments is not None, "q_segment_ids_BT", None, rule)
  rule = f"S={S} keys need segments of their own beside T={T} queries"
  alone = q_segments is not None and k_segments is None
  check(not alone or T == S, "k_segment_ids_BS", None, rule)
  if q_positions is not None and k_positions is None:
    tokens = tokens._replace(k_positions_BS=jnp.arange(S, dtype=jnp.int32)[None])
  return tokens._replace(k_segment_ids_BS=q_segments) if alone else tokens


def check_options(
  causal: bool,
  window: int | None,
  cap: float | None,
  scale: float | None,
  H: int,
  interpret: Any,
) -> Options:
  """Returns the options with the scale filled in; raises UserError for what is out of range."""
  if window is not None:
    whole = isinstance(window, numbers.Integral) and not isinstance(window, bool)
    check(whole and window >= 1, "window", window, "must be None or an integer of at least 1")
    check(causal, "window", window, "counts the keys up to the query's own: needs causal=True")
  if cap is not None:
    check_number("cap", cap, above=0)
  if scale is not None:
    check_number("scale", scale)
  return Options(
    causal=bool(causal),
    window=None if window is None else int(window),
    cap=None if cap is None else float(cap),
    scale=H**-0.5 if scale is None else float(scale),
    interpret=interpret,
  )


def check_spread_alike(name: str, array: jax.Array, query_axes: tuple[Axes, Axes, Axes]) -> None:
  """Raises UserError unless B, S and heads are spread like the queries', or not at all.

  Key heads must divide over the axes of the queries' heads. S may not stay whole.
  """
  for dimension, axes in enumerate(query_axes):
    rule = f"must be spread like q_BTNH, whose dimension {dimension} lies over {axes}"
    allowed = (axes,) if dimension == 1 else ((), axes)
    check(sharded_axes(array, dimension) in allowed, name, str(jax.typeof(array)), rule)
  mesh_shape = jax.typeof(array).sharding.mesh.shape
  shards = math.prod(mesh_shape[axis] for axis in query_axes[2])
  rule = (
    f"its K={array.shape[2]} heads cannot be split over the {shards} devices of {query_axes[2]}"
  )
  check(array.shape[2] % shards == 0, name, str(jax.typeof(array)), rule)
