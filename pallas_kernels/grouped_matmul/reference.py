"""Multiplies all rows by every matrix and keeps the group's own; others are compared with it."""

# T rows, K inner, N outer size of a matrix, E groups, P padded rows, S blocks of padded rows
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import reference as quantized
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.reference import quantize
from pallas_kernels.grouped_matmul.segments import Segments, pad_rows

__all__ = ["quantize", "rows", "weights"]


def rows(
  left: Any, right: Any, sizes_E: jax.Array, axis: int, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns row t of `left` times the matrix of its group, contracted over the matrix's `axis`."""
  del axis, interpret
  T = jax.tree.leaves(left)[0].shape[0]
  ends_E = jnp.cumsum(sizes_E)
  row_T1 = jnp.arange(T)[:, None]
  total = None
  for e, w in enumerate(unstack(right)):
    own_T1 = (row_T1 >= ends_E[e] - sizes_E[e]) & (row_T1 < ends_E[e])
    # other groups' rows and matrices may hold NaN
    product = multiply(mask(left, own_T1), w, how)
    product = jnp.where(own_T1, product, jnp.zeros_like(product))
    total = product if total is None else total + product
  assert total is not None, "there is at least one group"
  return total


def unstack(tree: Any) -> list[Any]:
  """Returns the matrix of each group, with its scales."""
  leaves, shape = jax.tree.flatten(tree)
  return [jax.tree.unflatten(shape, of_group) for of_group in zip(*leaves)]


def mask(left: Any, own_T1: jax.Array) -> Any:
  """Returns the rows with zeros in place of other groups'."""
  return jax.tree.map(lambda a: jnp.where(own_T1, a, jnp.zeros_like(a)), left)


def multiply(left: Any, right: Any, how: Contraction) -> jax.Array:
  """Contracts two matrices, of floats or of codes with scales."""
  if isinstance(left, Quantized):
    return quantized.contract(left, right, how)
  product = jax.lax.dot_general(
    left,
    right,
    (((how.axes[0],), (how.axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
    preferred_element_type=how.sum_dtype,
  )
  return product.astype(how.out_dtype)


def weights(
  left: Any, right: Any, segments: Segments, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns for each group the product of its rows, left^T right: [E, K, N]; codes are padded."""
  del interpret
  if not isinstance(left, Quantized):
    left, right = pad_rows(left, segments), pad_rows(right, segments)
  P = segments.row_P.shape[0]
  block = P // segments.group_S.shape[0]

  def of_group(e: int) -> jax.Array:
    own_S = segments.group_S == e

    def own(a: jax.Array) -> jax.Array:
      own_rows = jnp.repeat(own_S, block) if a.shape[0] == P else own_S
      return jnp.where(own_rows[:, None], a, jnp.zeros_like(a))

    return multiply(jax.tree.map(own, left), jax.tree.map(own, right), how)

  return jnp.stack([of_group(e) for e in range(segments.sizes_E.shape[0])])
