"""Contracts with a weight; says how weights start, how they are sharded and how they are used."""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, QuantRule, QuantSpec
from jaxlm.config.formats import Format
from jaxlm.config.quant import find_spec, shared_spec
from jaxlm.models.matmul import matmul
from jaxlm.models.products import PRODUCTS
from jaxlm.quant.apply import (
  init_scales,
  learned_names,
  quantize,
  quantize_gradient,
  scale_role,
  shares_rotation,
  turn,
  unit_normal,
)
from jaxlm.quant.packed_matmul import can_multiply_packed, packed_matmul
from jaxlm.quant.packing import Packed, packed_shapes, unpack_operand
from pallas_kernels.common.errors import UnsupportedError
from sharding.rules import (
  Names,
  all_gather_weight,
  apply_undeferred,
  is_sharded,
  shard,
  spec,
  weight_shape,
)

Roles = dict[str, Any]
"""A tree like that of parameters: "embedding", "matrix", "head", "norm", "bias", "taps", "scale",
"decayed_scale" or "packed"."""


def sharded_normal(
  key: jax.Array, shape: tuple[int, ...], std: float, *names: str | None
) -> jax.Array:
  """Draws normal float32 weights of this standard deviation, sharded by their logical axes."""
  return shard(std * jax.random.normal(key, weight_shape(shape, *names), jnp.float32), *names)


def sharded_zeros(key: jax.Array, shape: tuple[int, ...], *names: str | None) -> jax.Array:
  """Returns float32 zeros, sharded by their logical axes."""
  return shard(jnp.zeros(weight_shape(shape, *names), jnp.float32), *names)


class Linear(nn.Module):
  """Multiplies by a weight [D, F] and adds a bias [F]: every contraction with a weight is one.

  `axes` are the logical axes of the weight as it is stored, `out` those of the result [B, T, F].
  `rules` say which formats weight, input and gradient have, or what replaces the product; this is
  the only place where they act.
  """

  shape: tuple[int, int]
  std: float
  axes: Names
  out: Names
  compute: ComputeConfig
  rules: tuple[QuantRule, ...]
  biased: bool = False
  role: str = "matrix"
  out_dtype: str | None = None
  """of the result; by default the compute type"""
  layers: tuple[int, ...] = ()
  """the layers that this module computes (a scan computes several by one module); none: the head"""

  def setup(self) -> None:
    """Declares the weight, the bias, and the scales that formats learn."""
    self.packed = self._declare_packed()
    if not self.packed:
      self.weight = self.param("weight", sharded_normal, self.shape, self.std, *self.axes)
    self.bias = None
    if self.biased:
      self.bias = self.param("bias", sharded_zeros, self.shape[1:], self.axes_in_use[1])
    self.scales = {
      operand: {
        name: self.param(f"{operand}_{name}", self._init_scale, format, operand, name)
        for name in learned_names(format)
      }
      for operand, format in self._learned_formats().items()
    }

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    weight = {f"packed_{name}": "packed" for name in self.packed} or {"weight": self.role}
    roles: Roles = weight | ({"bias": "bias"} if self.biased else {})
    for operand, format in self._learned_formats().items():
      roles |= {f"{operand}_{name}": scale_role(format) for name in learned_names(format)}
    return roles

  def _declare_packed(self) -> Packed:
    """Returns the weight in bytes, where it comes so; raises where only some layers of it do."""
    specs = {find_spec(self.rules, name) for name in self.names}
    if not any(spec.packed for spec in specs):
      return {}
    if len({spec.weight for spec in specs if spec.packed}) > 1 or len(specs) > 1:
      rule = f"{self.names[0]} and other layers of its stack are packed differently"
      raise UnsupportedError(f"model.quant: {rule}: put these layers in model.prefix")
    (spec,) = specs
    assert spec.weight is not None
    shapes = packed_shapes(spec.weight, self.shape)
    return {
      name: self.param(f"packed_{name}", lambda key, like=like: jnp.zeros(like.shape, like.dtype))
      for name, like in shapes.items()
    }

  def _init_scale(self, key: jax.Array, format: Format, operand: str, name: str) -> jax.Array:
    """Returns a scale's first value: for the weight as drawn, or for normal inputs."""
    if operand == "activation":
      return init_scales(unit_normal(), format)[name]
    n = max(find_spec(self.rules, name).hadamard for name in self.names)
    turned_DF = turn(self.weight, n, axis=0)
    scale = apply_undeferred(lambda w_DF: init_scales(w_DF.T, format)[name], turned_DF)
    return scale if scale.shape == (1,) else shard(scale, self.axes_in_use[1])

  def _learned_formats(self) -> dict[str, Format]:
    """Returns the formats of weight and input that learn scales; they are stacked over layers.

    Raises UnsupportedError where the layers of this module would need different ones.
    """
    formats: dict[str, Format] = {}
    for operand in ("activation",) if self.packed else ("weight", "activation"):
      several = {getattr(find_spec(self.rules, name), operand) for name in self.names}
      several = {format for format in several if learned_names(format)}
      if len(several) > 1:
        words = " and ".join(sorted(map(str, several)))
        rule = f"{self.names[0]} and other layers of its stack would learn scales of {words}"
        raise UnsupportedError(f"model.quant: {rule}: put these layers in model.prefix")
      if several:
        formats[operand] = several.pop()
    return formats

  @property
  def axes_in_use(self) -> Names:
    """Returns the logical axes that still split the weight in use: `embed` is gathered."""
    return tuple(None if axis == "embed" else axis for axis in self.axes)

  @property
  def names(self) -> tuple[str, ...]:
    """Returns this contraction's name per layer, as in "layers.3.mixer.q", or "head"."""
    path = ".".join(self.path)
    return tuple(f"layers.{layer}.{path}" for layer in self.layers) or (path or "head",)

  @property
  def quant(self) -> QuantSpec:
    """Returns how this contraction is computed, which is the same in all layers of the module."""
    return shared_spec(self.rules, self.names)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns x w + bias [B, T, F] in `out_dtype`.

    A weight in bytes stays so where a kernel takes its codes and the weight lies on one device;
    else it is unpacked for each product.
    """
    dtype, product = self.out_dtype or self.compute.dtype, self.quant.product
    key = self.make_rng("rounding") if self.has_rng("rounding") else None
    contract = None
    if product is not None:
      contract = functools.partial(PRODUCTS[type(product)], product, key)
    x_BTD, format = self.input_in_use(x_BTD), self.quant.weight
    if self.packed and format is not None and can_multiply_packed(format) and not is_sharded():
      y_BTF = packed_matmul(x_BTD, self.packed, self.quant, dtype)
    else:
      y_BTF = matmul(x_BTD, self.weight_in_use(), self.axes_in_use, self.out, dtype, contract)
    if self.quant.gradient is not None:
      y_BTF = quantize_gradient(y_BTF, self.quant.gradient, key)
    return add_bias(y_BTF, self.bias, self.out)

  def input_in_use(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the input [B, T, D] as it is multiplied."""
    x_BTD = turn(x_BTD, self.quant.hadamard)
    scales, rotated = self.scales.get("activation"), shares_rotation(self.quant)
    return quantize(x_BTD, self.quant.activation, scales=scales, N=self.shape[0], rotated=rotated)

  def weight_in_use(self) -> jax.Array:
    """Returns the weight [D, F] as it is multiplied: in the compute type, gathered on a mesh."""
    dtype, reduce_dtype = self.compute.dtype, self.compute.reduce_dtype
    if self.packed:
      return unpack_operand(self.packed, self.quant, self.shape[0]).T.astype(dtype)
    w_DF = quantize(
      turn(self.weight, self.quant.hadamard, axis=0),
      self.quant.weight,
      axis=0,
      scales=self.scales.get("weight"),
      N=self.shape[0] * self.shape[1],
      rotated=shares_rotation(self.quant),
    )
    return all_gather_weight(w_DF, self.axes_in_use, dtype, reduce_dtype)


def add_bias(x_BTF: jax.Array, bias_F: jax.Array | None, names: Names) -> jax.Array:
  """Adds the bias in x's dtype.

  On a mesh it is a product with ones, whose gradient may stay unsummed per device.
  """
  if bias_F is None:
    return x_BTF
  bias_F = bias_F.astype(x_BTF.dtype)
  if not is_sharded():
    return x_BTF + bias_F[None, None]
  ones_BT = shard(jnp.ones(x_BTF.shape[:2], x_BTF.dtype), *names[:2])
  sharding = spec(x_BTF.shape, *names)
  return x_BTF + jnp.einsum(
    "bt,f->btf", ones_BT, bias_F, out_sharding=sharding, precision="highest"
  )


def declare_parts(module: nn.Module, *names: str) -> Roles:
  """Creates the parameters of these submodules and returns their roles by name."""
  return {name: getattr(module, name).declare() for name in names}
