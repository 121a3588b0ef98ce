"""Multiplies by the dequantised weights; other implementations are compared with it."""

# M rows, K inner, N outer size of a matrix, G groups of K
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lowbit_matmul.packing import FormatName, unpack


def dequantize(
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  K: int,
  group: int,
  dtype: FormatName,
  sum_dtype: Any = jnp.float32,
) -> jax.Array:
  """Returns the weights s (q - z) in float32 or wider, [K, N]."""

  def spread(array_GN: jax.Array) -> jax.Array:
    return jnp.repeat(array_GN.astype(sum_dtype), group, axis=0)[:K]

  weights_KN = unpack(packed, dtype, K).astype(sum_dtype)
  if zeros_GN is not None:
    weights_KN = weights_KN - spread(zeros_GN)
  return weights_KN * spread(scales_GN)


def multiply(
  x_MK: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  group: int,
  dtype: FormatName,
) -> jax.Array:
  """Returns X W in float32 or wider."""
  sum_dtype = jnp.promote_types(x_MK.dtype, jnp.float32)
  w_KN = dequantize(packed, scales_GN, zeros_GN, x_MK.shape[1], group, dtype, sum_dtype)
  return jnp.dot(x_MK.astype(sum_dtype), w_KN, precision=jax.lax.Precision.HIGHEST)


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
  sum_dtype = jnp.promote_types(dy_MN.dtype, jnp.float32)
  w_KN = dequantize(packed, scales_GN, zeros_GN, K, group, dtype, sum_dtype)
  return jnp.dot(dy_MN.astype(sum_dtype), w_KN.T, precision=jax.lax.Precision.HIGHEST)
