"""Multiplies one block of rows at a time with the matrix of its group, in plain JAX.

`jax.lax.ragged_dot` does E times the work on CPU and holds E copies of the rows, and its gradient
of the matrices does E times the work on TPU as well. Here the memory is the padded rows' and the
results'.
"""

# T rows, K inner, N outer size of a matrix, E groups, P padded rows, S blocks of padded rows
from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.fp8_matmul import xla as quantized
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.reference import quantize
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.segments import Segments, make_segments, pad_rows, unpad_rows

ROWS = 128

__all__ = ["quantize", "rows", "weights"]


def rows(
  left: Any, right: Any, sizes_E: jax.Array, axis: int, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns row t of `left` times the matrix of its group, contracted over the matrix's `axis`."""
  del axis, interpret
  T = jax.tree.leaves(left)[0].shape[0]
  segments = make_segments(sizes_E, T, min(ROWS, T))
  padded = jax.tree.map(lambda a: pad_rows(a, segments), left)

  def of_block(block: Any) -> jax.Array:
    left, group = block
    return multiply(left, jax.tree.map(lambda a: a[group], right), how)

  y_SRN = jax.lax.map(of_block, (in_blocks(padded, segments), segments.group_S))
  return unpad_rows(y_SRN.reshape(-1, y_SRN.shape[-1]), segments)


def weights(
  left: Any, right: Any, segments: Segments, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns for each group the product of its rows, left^T right: [E, K, N]; codes are padded."""
  del interpret
  if not isinstance(left, Quantized):
    left, right = pad_rows(left, segments), pad_rows(right, segments)
  K, N = (jax.tree.leaves(operand)[0].shape[1] for operand in (left, right))

  def add_block(sum_EKN: jax.Array, block: Any) -> tuple[jax.Array, None]:
    left, right, group = block
    return sum_EKN.at[group].add(multiply(left, right, how)), None

  start = zeros_varying_like((segments.sizes_E.shape[0], K, N), how.out_dtype, left, right)
  blocks = (*(in_blocks(operand, segments) for operand in (left, right)), segments.group_S)
  return jax.lax.scan(add_block, start, blocks)[0]


def in_blocks(padded: Any, segments: Segments) -> Any:
  """Splits the leading axis of every array into the S blocks."""
  S = segments.group_S.shape[0]
  return jax.tree.map(lambda a: a.reshape(S, a.shape[0] // S, *a.shape[1:]), padded)


def multiply(left: Any, right: Any, how: Contraction) -> jax.Array:
  """Contracts two matrices, of floats or of codes with scales."""
  if isinstance(left, Quantized):
    return quantized.contract(left, right, how)
  return reference.multiply(left, right, how)
