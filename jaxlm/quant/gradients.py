"""Gives quantised values, and the scales behind them, the gradients of their papers."""

# Z any leading axes, D contracted axis

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@jax.custom_vjp
def straight_through(x: jax.Array, quantized: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Returns `quantized` in x's dtype; x gets the gradient where `mask` is true, or all of it.

  The identity x + stop_gradient(quantized - x) would round twice.
  """
  return quantized.astype(x.dtype)


def _forward(
  x: jax.Array, quantized: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  return straight_through(x, quantized, mask), mask


def _backward(mask: jax.Array | None, dy: jax.Array) -> tuple[jax.Array, None, None]:
  return dy if mask is None else jnp.where(mask, dy, 0), None, None


straight_through.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def with_scale_gradient(
  x_ZD: jax.Array,
  scale: jax.Array,
  quantized_ZD: jax.Array,
  mask_ZD: jax.Array,
  slope_ZD: jax.Array,
  factor: float,
) -> jax.Array:
  """Returns `quantized_ZD` in x's dtype, with gradients to x and to its learned scale.

  The scale is [1], or [Z] for a matrix [Z, D]. x gets the gradient where the mask is true, the
  scale `factor` times the sum of gradient * slope over what shares it.
  """
  return quantized_ZD.astype(x_ZD.dtype)


def _scale_forward(
  x_ZD: jax.Array,
  scale: jax.Array,
  quantized_ZD: jax.Array,
  mask_ZD: jax.Array,
  slope_ZD: jax.Array,
  factor: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  y_ZD = with_scale_gradient(x_ZD, scale, quantized_ZD, mask_ZD, slope_ZD, factor)
  return y_ZD, (scale, mask_ZD, slope_ZD)


def _scale_backward(
  factor: float, residuals: tuple[jax.Array, jax.Array, jax.Array], dy_ZD: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
  scale, mask_ZD, slope_ZD = residuals
  product_ZD = dy_ZD.astype(jnp.float32) * slope_ZD
  axes = None if scale.shape == (1,) else -1
  d_scale = (factor * jnp.sum(product_ZD, axis=axes)).reshape(scale.shape)
  return jnp.where(mask_ZD, dy_ZD, 0), d_scale.astype(scale.dtype), None, None, None


with_scale_gradient.defvjp(_scale_forward, _scale_backward)
