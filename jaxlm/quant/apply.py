"""Applies number formats to the operands of a matmul, on a mesh too.

What a format computes is in its own file, which has `quantize(x, format, ...)`, `encode` and
`decode`, and `init_scales` where it learns scales.
"""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Format,
  Fp8Format,
  LsqFormat,
  MatquantFormat,
  PactFormat,
  ParetoqFormat,
  QuestFormat,
  SparseFormat,
  UniformFormat,
)
from jaxlm.config.quant import QuantSpec
from jaxlm.quant import (
  bitnet,
  block_formats,
  fp8,
  lsq,
  matquant,
  pact,
  paretoq,
  quest,
  sparse,
  turning,
  uniform,
)
from sharding.rules import apply_undeferred

FORMATS: dict[type, ModuleType] = {
  UniformFormat: uniform,
  LsqFormat: lsq,
  PactFormat: pact,
  BitnetFormat: bitnet,
  ParetoqFormat: paretoq,
  QuestFormat: quest,
  MatquantFormat: matquant,
  BlockFormat: block_formats,
  Fp8Format: fp8,
  SparseFormat: sparse,
}


def quantize(
  x: jax.Array,
  format: Format | None,
  axis: int = -1,
  *,
  scales: Mapping[str, jax.Array] | None = None,
  N: int = 0,
  key: jax.Array | None = None,
  rotated: bool = False,
) -> jax.Array:
  """Returns x in this format, with scales along `axis`, in x's dtype; None leaves it as it is.

  `scales` are the format's learned ones, whose gradients are scaled by N as its paper says. `key`
  is for random rounding. `rotated`: a QuEST format does not rotate back. On a mesh the result is
  spread as x is.
  """
  if format is None:
    return x
  run = functools.partial(_quantize, format, axis, N, key, rotated, tuple(scales or ()))
  return apply_undeferred(run, x, *(scales or {}).values())


def _quantize(
  format: Format,
  axis: int,
  N: int,
  key: jax.Array | None,
  rotated: bool,
  names: tuple[str, ...],
  x: jax.Array,
  *scales: jax.Array,
) -> jax.Array:
  x = jnp.moveaxis(x, axis, -1)
  module = FORMATS[type(format)]
  if names:
    x = module.quantize(x, format, N, **dict(zip(names, scales)))
  elif isinstance(format, BlockFormat):
    x = block_formats.quantize(x, format, key)
  elif rotated and isinstance(format, QuestFormat):
    x = quest.quantize_rotated(x, format)
  else:
    x = module.quantize(x, format)
  return jnp.moveaxis(x, -1, axis)


def turn(x: jax.Array, n: int, axis: int = -1) -> jax.Array:
  """Returns x with blocks of n entries of an axis turned (`turning.turn`), on a mesh too."""
  if not n:
    return x
  return apply_undeferred(
    lambda x: jnp.moveaxis(turning.turn(jnp.moveaxis(x, axis, -1), n), -1, axis), x
  )


def learned_names(format: Format | None) -> tuple[str, ...]:
  """Returns the names of the scales that a format learns."""
  return {LsqFormat: ("step",), ParetoqFormat: ("scale",), PactFormat: ("clip",)}.get(
    type(format), ()
  )


def scale_role(format: Format) -> str:
  """Returns the optimizer's role of the scales that a format learns."""
  decays = isinstance(format, LsqFormat | PactFormat) and format.decays
  return "decayed_scale" if decays else "scale"


def init_scales(x_ZD: jax.Array, format: Format) -> dict[str, jax.Array]:
  """Returns the first values of the scales that a format learns, for these values, [1] or [Z]."""
  return FORMATS[type(format)].init_scales(x_ZD, format)


def unit_normal() -> jax.Array:
  """Returns values [1, 1024] that lie like normal ones: what inputs are before any is seen."""
  return jax.scipy.stats.norm.ppf((jnp.arange(1024.0) + 0.5) / 1024)[None]


def shares_rotation(spec: QuantSpec) -> bool:
  """Returns whether weight and input are rotated alike, so that neither has to be rotated back."""
  weight, activation = spec.weight, spec.activation
  if not (isinstance(weight, QuestFormat) and isinstance(activation, QuestFormat)):
    return False
  return weight.hadamard == activation.hadamard


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantize_gradient(y: jax.Array, format: Format, key: jax.Array | None) -> jax.Array:
  """Returns y; its gradient is quantised along the last axis, with `key` for random rounding."""
  return y


def _forward(
  y: jax.Array, format: Format, key: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  return y, key


def _backward(format: Format, key: jax.Array | None, dy: jax.Array) -> tuple[jax.Array, None]:
  return quantize(dy, format, key=key), None


quantize_gradient.defvjp(_forward, _backward)
