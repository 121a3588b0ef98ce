"""Refuses what no implementation of sparse attention can do, and records its checked options."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries and keys, U width of values, I selected blocks of a query
from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_dtype, check_number, check_shape
from pallas_kernels.sparse_attention.places import BlockSizes, Options


def check_sizes(sizes: BlockSizes) -> None:
  """Raises UserError for sizes that are no positive integers or do not divide each other."""
  check(isinstance(sizes, BlockSizes), "sizes", sizes, "must be BlockSizes")
  for field in dataclasses.fields(sizes):
    value = getattr(sizes, field.name)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    check(whole and value >= 1, f"sizes.{field.name}", value, "must be an integer of at least 1")
  stride, length, block = sizes.stride, sizes.length, sizes.block
  rule = "must be a multiple of sizes.stride"
  check(length % stride == 0, "sizes.length", length, f"{rule}={stride}")
  check(block % stride == 0, "sizes.block", block, f"{rule}={stride}")
  check(length <= block, "sizes.length", length, f"must be at most sizes.block={block}")


def check_queries(q_BTNH: jax.Array, K: int) -> None:
  """Raises UserError unless queries are floating and their heads a multiple of the keys'."""
  check_shape("q_BTNH", q_BTNH, (None,) * 4)
  check_dtype("q_BTNH", q_BTNH, jnp.floating)
  check(min(q_BTNH.shape[2:]) >= 1, "q_BTNH.shape", q_BTNH.shape, "needs a head and a width")
  fits = K >= 1 and q_BTNH.shape[2] % K == 0
  check(fits, "q_BTNH.shape", q_BTNH.shape, f"its N must be a multiple of the keys' K={K}")


def check_keys(names: tuple[str, str], q_BTNH: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Raises UserError unless keys [B, S, K, H] and values [B, S, K, U] fit the queries."""
  B, _, _, H = q_BTNH.shape
  for name, array in zip(names, (k, v)):
    check_shape(name, array, (B, None, None, None))
    rule = f"must be that of q_BTNH, {q_BTNH.dtype}"
    check(array.dtype == q_BTNH.dtype, f"{name}.dtype", str(array.dtype), rule)
  check_shape(names[0], k, (B, None, None, H))
  check_shape(names[1], v, (*k.shape[:3], None))
  check(v.shape[3] >= 1, f"{names[1]}.shape", v.shape, "needs a width")
  check_queries(q_BTNH, k.shape[2])


def check_places(
  B: int, T: int, S: int | None, positions_BT: jax.Array | None, segment_ids_BS: jax.Array | None
) -> None:
  """Raises UserError unless positions and segments are integers of one row or B."""
  for name, array, size in (
    ("positions_BT", positions_BT, T),
    ("segment_ids_BS", segment_ids_BS, S),
  ):
    if array is not None:
      check_dtype(name, array, jnp.integer)
      check_shape(name, array, (None, size))
      check(array.shape[0] in (1, B), f"{name}.shape", array.shape, f"needs 1 or B={B} rows")
  rule = f"T={T} queries of S={S} keys need positions_BT" if S is None or T > S else ""
  check(positions_BT is not None or not rule or S is None, "positions_BT", None, rule)


def make_options(sizes: BlockSizes, scale: float | None, H: int, interpret: Any) -> Options:
  """Returns the options with the scale filled in; raises UserError for what is out of range."""
  check_sizes(sizes)
  if scale is not None:
    check_number("scale", scale)
  return Options(sizes, H**-0.5 if scale is None else float(scale), interpret)
