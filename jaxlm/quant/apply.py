"""Applies number formats to the operands of a matmul, on a mesh too.

What a format computes is in its own file, which has `quantize(x, format, **scales)`, `encode` and
`decode`, and `init_scales` where it learns scales.
"""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxlm.config.quant import Format, UniformFormat
from jaxlm.quant import uniform
from sharding.rules import apply_undeferred

FORMATS: dict[type, ModuleType] = {UniformFormat: uniform}


def quantize(
  x: jax.Array,
  format: Format | None,
  axis: int = -1,
  scales: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
  """Returns x in this format, with scales along `axis`, in x's dtype; None leaves it as it is.

  `scales` are the format's learned ones. On a mesh the result is spread as x is.
  """
  if format is None:
    return x
  names, values = (scales or {}).keys(), (scales or {}).values()

  def run(x: jax.Array, *values: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, axis, -1)
    x = FORMATS[type(format)].quantize(x, format, **dict(zip(names, values)))
    return jnp.moveaxis(x, -1, axis)

  return apply_undeferred(run, x, *values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantize_gradient(y: jax.Array, format: Format) -> jax.Array:
  """Returns y; its gradient is quantised along the last axis."""
  return y


def _forward(y: jax.Array, format: Format) -> tuple[jax.Array, None]:
  return y, None


def _backward(format: Format, _: None, dy: jax.Array) -> tuple[jax.Array]:
  return (quantize(dy, format),)


quantize_gradient.defvjp(_forward, _backward)
