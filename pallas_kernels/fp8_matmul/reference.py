"""Quantises and multiplies in plain JAX; other implementations are compared with it."""

# M, N rows and columns of a matrix or of a product, K contracted; I, J a block's sizes
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.fp8_matmul.codes import (
  Contraction,
  Format,
  Quantized,
  encode,
  largest_magnitude,
  scale_of_block,
)


def quantize(
  x_MN: jax.Array,
  block: tuple[int, int],
  form: Format,
  mode: str,
  interpret: Any = False,
  transposed: bool = False,
) -> Quantized:
  """Returns codes [M, N] and scales [ceil(M / I), ceil(N / J)] for blocks of [I, J].

  A block at the edge has the scale of its existing numbers. The last two arguments are for kernels.
  """
  (M, N), (I, J) = x_MN.shape, block
  x_MN = x_MN.astype(jnp.float32)
  padded = pad_axis(pad_axis(x_MN, round_up(M, I), 0), round_up(N, J), 1)
  blocks = padded.reshape(padded.shape[0] // I, I, padded.shape[1] // J, J)
  scales = scale_of_block(largest_magnitude(blocks, (1, 3)), form.largest, mode)
  return Quantized(encode(x_MN, spread(scales, block, (M, N)), form), scales)


def spread(scales: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
  """Repeats each scale over its block: [M, N]."""
  repeated = jnp.repeat(jnp.repeat(scales, block[0], axis=0), block[1], axis=1)
  return repeated[: shape[0], : shape[1]]


def dequantize(
  quantized: Quantized, block: tuple[int, int], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """Returns codes * scales in float32, or a wider type."""
  codes, scales = quantized
  return codes.astype(dtype) * spread(scales, block, codes.shape).astype(dtype)


def contract(left: Quantized, right: Quantized, how: Contraction) -> jax.Array:
  """Contracts the dequantised matrices."""
  product = jax.lax.dot_general(
    dequantize(left, how.blocks[0], how.sum_dtype),
    dequantize(right, how.blocks[1], how.sum_dtype),
    (((how.axes[0],), (how.axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
  )
  return product.astype(how.out_dtype)
