"""Arranges arrays by what shares one scale; the contracted axis is the last."""

# Z any leading axes, D contracted axis

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config.checks import check
from jaxlm.config.formats import Shared


class Encoded(NamedTuple):
  """Holds codes in the array's own shape, and what decodes them."""

  codes: jax.Array
  """int32"""
  scale: jax.Array
  """float32: [] per tensor, [Z] per row, [Z, D / size] per group, [.., Z / size, D / size]"""
  zero: jax.Array | None = None
  """float32, like `scale`: the code of the value 0, in affine formats"""
  tensor_scale: jax.Array | None = None
  """float32 []: a factor on all scales, in nvfp4"""


def split(x_ZD: jax.Array, shared: Shared, size: int) -> tuple[jax.Array, tuple[int, ...]]:
  """Returns the array with an axis for each group, and the axes over which one scale extends.

  Raises UserError where the size does not divide the array.
  """
  if shared == "tensor":
    return x_ZD, tuple(range(x_ZD.ndim))
  if shared == "row":
    return x_ZD, (x_ZD.ndim - 1,)
  for axis in (-1, -2)[: 1 + (shared == "block")]:
    rule = f"must divide the {x_ZD.shape[axis]} entries of axis {axis}"
    check(x_ZD.shape[axis] % size == 0, "format.size", size, rule)
  *lead, D = x_ZD.shape
  if shared == "group":
    return x_ZD.reshape(*lead, D // size, size), (len(lead) + 1,)
  *lead, Z = lead
  n = len(lead)
  return x_ZD.reshape(*lead, Z // size, size, D // size, size), (n + 1, n + 3)


def expand(scale: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns scales, as `Encoded` holds them, in the shape that broadcasts with a split array."""
  return jnp.expand_dims(scale, axes)


def has_zero_group(x_ZD: jax.Array, shared: Shared, size: int) -> jax.Array:
  """Returns whether all values that share a scale are zero, somewhere: bool []."""
  x_split, axes = split(x_ZD, shared, size)
  return jnp.any(jnp.all(x_split == 0, axis=axes))


def safe(scale: jax.Array) -> jax.Array:
  """Returns scales that can be divided by: a zero one, of values that are all zero, becomes 1."""
  return jnp.where(scale > 0, scale, jnp.ones_like(scale))


def learned(scale: jax.Array, x_ZD: jax.Array, least: float) -> jax.Array:
  """Returns a learned scale, [1] or [Z], at least `least`, in the shape that broadcasts with x."""
  scale = jnp.maximum(jax.lax.stop_gradient(scale), least)
  return scale.reshape((1,) * x_ZD.ndim) if scale.shape == (1,) else scale[:, None]
