"""Multiplies by packed weights in plain JAX, dequantising one slice of K at a time."""

# M rows, K inner, N outer size of a matrix, G groups of K, C slices of K
from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.lowbit_matmul import reference
from pallas_kernels.lowbit_matmul.packing import FORMATS, Format, FormatName

SLICE = 256


def slices(
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  K: int,
  group: int,
  form: Format,
) -> tuple[int, int, Any]:
  """Returns the rows and groups of a slice, and the weights with a leading axis of slices.

  A slice holds whole groups and bytes, or it is a part of one group.
  """
  whole = math.lcm(8, form.codes)
  part, groups_end = round_up(SLICE, whole), math.lcm(group, whole)
  if group >= K:
    rows = size = min(part, round_up(K, whole))
  elif group >= SLICE and group % part == 0:
    rows = size = part
  else:
    size, rows = group, round_up(K, groups_end)
    if group < SLICE:
      rows = min(rows, groups_end * max(1, SLICE // groups_end))
  count = -(-K // rows)

  def groups(array_GN: jax.Array | None) -> jax.Array | None:
    if array_GN is None:
      return None
    each_GN = jnp.repeat(array_GN, -(-group // size), axis=0)
    each_GN = pad_axis(each_GN, count * (rows // size), 0)[: count * (rows // size)]
    return each_GN.reshape(count, rows // size, -1)

  bytes_CBN = pad_axis(packed, count * form.bytes_of(rows), 0)
  bytes_CBN = bytes_CBN.reshape(count, form.bytes_of(rows), -1)
  return rows, size, (bytes_CBN, groups(scales_GN), groups(zeros_GN))


def multiply(
  x_MK: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  group: int,
  dtype: FormatName,
) -> jax.Array:
  """Returns X W in float32 or wider."""
  M, K = x_MK.shape
  rows, size, parts = slices(packed, scales_GN, zeros_GN, K, group, FORMATS[dtype])
  count = parts[0].shape[0]
  x_CMR = pad_axis(x_MK, count * rows, 1).reshape(M, count, rows).swapaxes(0, 1)

  def add(sum_MN: jax.Array, part: Any) -> tuple[jax.Array, None]:
    x_MR, (packed, scales_GN, zeros_GN) = part
    return sum_MN + reference.multiply(x_MR, packed, scales_GN, zeros_GN, size, dtype), None

  sum_dtype = jnp.promote_types(x_MK.dtype, jnp.float32)
  start = zeros_varying_like((M, packed.shape[1]), sum_dtype, x_MK, packed)
  return jax.lax.scan(add, start, (x_CMR, parts))[0]


def multiply_transposed(
  dy_MN: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  K: int,
  group: int,
  dtype: FormatName,
) -> jax.Array:
  """Returns dY W^T in float32 or wider."""
  rows, size, parts = slices(packed, scales_GN, zeros_GN, K, group, FORMATS[dtype])

  def of_slice(part: Any) -> jax.Array:
    return reference.multiply_transposed(
      dy_MN, part[0], part[1], part[2], K=rows, group=size, dtype=dtype
    )

  dx_CMR = jax.lax.map(of_slice, parts)
  return dx_CMR.swapaxes(0, 1).reshape(dy_MN.shape[0], -1)[:, :K]
