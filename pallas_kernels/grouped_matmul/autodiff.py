"""Makes the grouped product differentiable, in floats and in 8-bit codes."""

# T rows, K inner, N outer size of a matrix, E groups, P padded rows
from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.fp8_matmul.codes import FORMATS, Contraction, Quantized
from pallas_kernels.grouped_matmul.segments import make_segments, pad_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Holds what is static in a call."""

  dtype: str | None
  """format of the codes; None multiplies the floats themselves"""
  bwd_dtype: str | None
  scale: str
  block: int
  out_dtype: Any
  native: bool
  implementation: ModuleType
  interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x_TK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, options: Options) -> jax.Array:
  """Returns Y [T, N]; gradients pass through the rounding to codes as if there were none."""
  x: Any = x_TK
  w: Any = w_EKN
  if options.dtype is not None:
    x = quantize(x_TK, (1, options.block), options.dtype, options)
    w = quantize_matrices(w_EKN, options.dtype, options, transposed=True)
  how = contraction((1, 0), options.out_dtype, options)
  return options.implementation.rows(x, w, sizes_E, 0, how, options.interpret)


def forward(
  x_TK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, options: Options
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Returns Y and what the backward pass needs: X, the codes of W, and W's dtype.

  Kernels multiply W in another orientation backward, and its codes are made once for each.
  """
  w: Any = w_EKN
  if options.dtype is not None:
    w = quantize_matrices(w_EKN, options.dtype, options)
  saved = x_TK, w, sizes_E, jnp.zeros(0, w_EKN.dtype)
  return product(x_TK, w_EKN, sizes_E, options), saved


def backward(
  options: Options, saved: tuple[Any, ...], dy_TN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  """Returns the gradients of X, in its dtype, and of W, summed in float32; 0 for empty groups."""
  x_TK, w, sizes_E, like_w = saved
  run = options.implementation
  dy: Any = dy_TN
  if options.bwd_dtype is not None:
    dy = quantize(dy_TN, (1, options.block), options.bwd_dtype, options)
  how = contraction((1, 1), x_TK.dtype, options)
  dx_TK = run.rows(dy, w, sizes_E, 1, how, options.interpret)
  # No tile of scales straddles two groups, since each begins a block of padded rows.
  block = options.block if options.dtype else min(options.block, x_TK.shape[0])
  segments = make_segments(sizes_E, x_TK.shape[0], block)
  left: Any = x_TK
  right: Any = dy_TN
  if options.dtype is not None and options.bwd_dtype is not None:
    tall = (options.block, 1)
    left = quantize(pad_rows(x_TK, segments), tall, options.dtype, options)
    right = quantize(pad_rows(dy_TN, segments), tall, options.bwd_dtype, options)
  sum_dtype = jnp.promote_types(x_TK.dtype, jnp.float32)
  how = contraction((0, 0), sum_dtype, options)
  dw_EKN = run.weights(left, right, segments, how, options.interpret)
  return dx_TK, dw_EKN.astype(like_w.dtype), None


product.defvjp(forward, backward)


def quantize(
  x: jax.Array, block: tuple[int, int], dtype: str, options: Options, transposed: bool = False
) -> Quantized:
  """Returns codes with the scales of the blockwise recipe, in memory perhaps transposed."""
  run = options.implementation.quantize
  return run(x, block, FORMATS[dtype], options.scale, options.interpret, transposed)


def quantize_matrices(
  w_EKN: jax.Array, dtype: str, options: Options, transposed: bool = False
) -> Quantized:
  """Returns codes [E, K, N] and scales for square blocks, none of which has two matrices."""
  E, K, N = w_EKN.shape
  block = options.block
  w_EKN = pad_axis(w_EKN, round_up(K, block), 1)
  codes, scales = quantize(w_EKN.reshape(-1, N), (block, block), dtype, options, transposed)
  codes_EKN = codes.reshape(E, -1, N)[:, :K]
  return Quantized(codes_EKN, scales.reshape(E, -1, scales.shape[1]))


def contraction(axes: tuple[int, int], out_dtype: Any, options: Options) -> Contraction:
  """Returns how two matrices are contracted: activations in tiles, matrices in square blocks."""
  b = options.block
  blocks = {
    (1, 0): ((1, b), (b, b)),
    (1, 1): ((1, b), (b, b)),
    (0, 0): ((b, 1), (b, 1)),
  }[axes]
  return Contraction(
    axes=axes,
    blocks=blocks,
    out_dtype=jnp.dtype(out_dtype),
    native=options.native,
    interpret=options.interpret,
  )
