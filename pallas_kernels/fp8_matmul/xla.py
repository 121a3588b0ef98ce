"""Multiplies codes in plain JAX, one block of the contracted axis at a time."""

# M, N rows and columns of the product, K contracted, S blocks of K
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.platform import platform
from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.reference import quantize

__all__ = ["contract", "quantize"]


def contract(left: Quantized, right: Quantized, how: Contraction) -> jax.Array:
  """Contracts codes block by block, scales each product in float32 and adds it.

  Holds the codes, the scales and one float32 product.
  """
  (left_axis, right_axis), size, dtype = how.axes, how.block, how.sum_dtype
  steps = left.scales.shape[left_axis]
  left_codes = pad_axis(left.codes, steps * size, left_axis)
  right_codes = pad_axis(right.codes, steps * size, right_axis)
  scales_SM = free_scales(left, left_axis, how.blocks[0]).astype(dtype)
  scales_SN = free_scales(right, right_axis, how.blocks[1]).astype(dtype)

  def add_block(sum_MN: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
    a = jax.lax.dynamic_slice_in_dim(left_codes, step * size, size, left_axis)
    b = jax.lax.dynamic_slice_in_dim(right_codes, step * size, size, right_axis)
    scaled_MN = multiply(a, b, how) * scales_SM[step][:, None]
    return sum_MN + scaled_MN * scales_SN[step][None], None

  start = zeros_varying_like((scales_SM.shape[1], scales_SN.shape[1]), dtype, left, right)
  return jax.lax.scan(add_block, start, jnp.arange(steps))[0].astype(how.out_dtype)


def multiply(a: jax.Array, b: jax.Array, how: Contraction) -> jax.Array:
  """Contracts one block of codes; int8 products add up in int32, others in float32.

  Codes that the chip does not multiply are widened, exactly, to bfloat16 or on CPU to float32.
  """
  if not how.native:
    wide = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    a, b = a.astype(wide), b.astype(wide)
  product = jax.lax.dot_general(
    a,
    b,
    (((how.axes[0],), (how.axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else how.sum_dtype,
  )
  return product.astype(how.sum_dtype)


def free_scales(operand: Quantized, axis: int, block: tuple[int, int]) -> jax.Array:
  """Returns a scale for each block of K and each row (or column) of the product: [S, M]."""
  free = 1 - axis
  scales = jnp.moveaxis(operand.scales, axis, 0)
  return jnp.repeat(scales, block[free], axis=1)[:, : operand.codes.shape[free]]
