"""Makes the product of two matrices in 8-bit codes differentiable: one forward and two backward."""

# Y[M, N] = X[M, K] W[K, N]
from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import reference
from pallas_kernels.fp8_matmul.codes import FORMATS, Contraction, Quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Holds what a product needs to know beside its arrays; all of it is static."""

  dtype: str
  bwd_dtype: str
  scale: str
  block: int
  save: str
  out_dtype: Any
  implementation: ModuleType
  native: bool
  """whether the chip multiplies the codes as they are"""
  interpret: Any = False

  @property
  def flat(self) -> tuple[int, int]:
    """Returns the tile along rows: of a matrix that is contracted over its last axis."""
    return (1, self.block)

  @property
  def tall(self) -> tuple[int, int]:
    """Returns the tile along columns: of a matrix that is contracted over its first axis."""
    return (self.block, 1)

  @property
  def square(self) -> tuple[int, int]:
    """Returns the block of weights, the same for either axis."""
    return (self.block, self.block)


class Saved(NamedTuple):
  """Holds what the backward pass needs: X or its codes, the weight's codes."""

  x_MK: jax.Array | Quantized
  w_KN: Quantized
  like_x: jax.Array  # of size 0, for dtypes
  like_w: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_MK: jax.Array, w_KN: jax.Array, options: Options) -> jax.Array:
  """Returns Y; its gradients pass through the rounding as if there were none.

  | product | contracts | left | right | result |
  |---|---|---|---|---|
  | Y = X W | K | X, 1 x 128 | W, 128 x 128 | `out_dtype` |
  | dX = dY W^T | N | dY, 1 x 128 | the same codes of W | X's dtype |
  | dW = X^T dY | M | X, 128 x 1 | dY, 128 x 1 | float32, then W's dtype |
  """
  return _forward(x_MK, w_KN, options)[0]


def _forward(x_MK: jax.Array, w_KN: jax.Array, options: Options) -> tuple[jax.Array, Saved]:
  x = quantize(x_MK, options.flat, options.dtype, options)
  w = quantize(w_KN, options.square, options.dtype, options)
  # the same codes, in memory as the forward product reads them
  w_forward = quantize(w_KN, options.square, options.dtype, options, transposed=True)
  y_MN = contract(x, w_forward, (1, 0), (options.flat, options.square), options.out_dtype, options)
  kept = x if options.save == "fp8" else x_MK
  return y_MN, Saved(kept, w, jnp.zeros(0, x_MK.dtype), jnp.zeros(0, w_KN.dtype))


def _backward(options: Options, saved: Saved, dy_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
  dy = quantize(dy_MN, options.flat, options.bwd_dtype, options)
  dx_MK = contract(
    dy, saved.w_KN, (1, 1), (options.flat, options.square), saved.like_x.dtype, options
  )
  dy = quantize(dy_MN, options.tall, options.bwd_dtype, options)
  x_MK = saved.x_MK
  if isinstance(x_MK, Quantized):
    x_MK = reference.dequantize(x_MK, options.flat, jnp.bfloat16)  # exact: scales are powers of 2
  x = quantize(x_MK, options.tall, options.dtype, options, transposed=True)
  dw_KN = contract(x, dy, (0, 0), (options.tall, options.tall), jnp.float32, options)
  return dx_MK, dw_KN.astype(saved.like_w.dtype)


product.defvjp(_forward, _backward)


def quantize(
  x: jax.Array, block: tuple[int, int], dtype: str, options: Options, transposed: bool = False
) -> Quantized:
  """Quantises with the implementation, whose codes may be `transposed` in memory."""
  form, interpret = FORMATS[dtype], options.interpret
  return options.implementation.quantize(x, block, form, options.scale, interpret, transposed)


def contract(
  left: Quantized,
  right: Quantized,
  axes: tuple[int, int],
  blocks: tuple[tuple[int, int], tuple[int, int]],
  out_dtype: Any,
  options: Options,
) -> jax.Array:
  """Multiplies with the implementation."""
  how = Contraction(
    axes=axes,
    blocks=blocks,
    out_dtype=out_dtype,
    native=options.native,
    interpret=options.interpret,
  )
  return options.implementation.contract(left, right, how)
