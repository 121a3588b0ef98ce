"""Contracts with a weight; says how weights start, how they are sharded and how they are used.

Products accumulate in float32 and are cast to the compute type. Where `tensor` splits the
contracted axis, the devices' partial products are summed in the compute type.
"""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxlm.config import ComputeConfig
from sharding.rules import (
  Names,
  all_gather_weight,
  axes_in,
  is_sharded,
  manual_axes,
  shard,
  spec,
  weight_shape,
)

Roles = dict[str, Any]
"""A tree like that of parameters: "embedding", "matrix", "head", "norm", "bias" or "taps"."""


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
  """

  shape: tuple[int, int]
  std: float
  axes: Names
  out: Names
  compute: ComputeConfig
  biased: bool = False
  role: str = "matrix"
  out_dtype: str | None = None
  """of the result; by default the compute type"""
  layers: tuple[int, ...] = ()
  """the layers that this module computes (a scan computes several by one module); none: the head"""

  def setup(self) -> None:
    """Declares the weight and the bias."""
    self.weight = self.param("weight", sharded_normal, self.shape, self.std, *self.axes)
    self.bias = None
    if self.biased:
      self.bias = self.param("bias", sharded_zeros, self.shape[1:], self.axes_in_use[1])

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return {"weight": self.role} | ({"bias": "bias"} if self.biased else {})

  @property
  def axes_in_use(self) -> Names:
    """Returns the logical axes that still split the weight in use: `embed` is gathered."""
    return tuple(None if axis == "embed" else axis for axis in self.axes)

  @property
  def names(self) -> tuple[str, ...]:
    """Returns this contraction's name per layer, as in "layers.3.mixer.q", or "head"."""
    path = ".".join(self.path)
    return tuple(f"layers.{layer}.{path}" for layer in self.layers) or (path or "head",)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns x w + bias [B, T, F] in `out_dtype`."""
    dtype = self.out_dtype or self.compute.dtype
    y_BTF = matmul(x_BTD, self.weight_in_use(), self.axes_in_use, self.out, dtype)
    return add_bias(y_BTF, self.bias, self.out)

  def weight_in_use(self) -> jax.Array:
    """Returns the weight [D, F] as it is multiplied: in the compute type, gathered on a mesh."""
    dtype, reduce_dtype = self.compute.dtype, self.compute.reduce_dtype
    return all_gather_weight(self.weight, self.axes_in_use, dtype, reduce_dtype)


def matmul(
  x_BTD: jax.Array, w_DF: jax.Array, axes: Names, out: Names, dtype: str | jnp.dtype
) -> jax.Array:
  """Contracts [B, T, D] with [D, F] in float32 and returns [B, T, F] in `dtype`.

  `axes` are the logical axes of `w_DF`, `out` those of the result. Where D is split, the partial
  products are summed on the way to `out` (reduce-scatter), whose T is then "norm_length".
  """
  B, T, D = x_BTD.shape
  sharding = None
  if is_sharded():
    partial = spec((B, T, w_DF.shape[1]), "batch", "length", out[2])
    sharding = P(*partial, unreduced=axes_in(spec((D,), axes[0])))
  rounds = x_BTD.dtype == jnp.dtype(dtype) and x_BTD.dtype.itemsize < 4
  contract = _contract_rounded if rounds else _contract
  y_BTF = contract(x_BTD, w_DF, sharding).astype(dtype)
  if summed := manual_axes(axes[0]):
    y_BTF = jax.lax.psum_scatter(y_BTF, summed, scatter_dimension=1, tiled=True)
  else:
    y_BTF = shard(y_BTF, *out)
  return checkpoint_name(y_BTF, "product")


def _contract(x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None) -> jax.Array:
  """Contracts in float32, or in a wider type of the arguments.

  On one device B and T are merged: a weight gradient that contracts two axes makes XLA on CPU write
  transposed copies.
  """
  if sharding is not None:
    return _einsum("btd,df->btf", x_BTD, w_DF, sharding)
  B, T, D = x_BTD.shape
  return _einsum("zd,df->zf", x_BTD.reshape(B * T, D), w_DF).reshape(B, T, w_DF.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_rounded(x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None) -> jax.Array:
  """Contracts in float32 and rounds to x's type, in which its backward pass multiplies too.

  Automatic differentiation would multiply float32 cotangents, at half the speed or less, although
  they hold numbers of x's type.
  """
  return _contract(x_BTD, w_DF, sharding).astype(x_BTD.dtype)


def _contract_rounded_forward(
  x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _contract_rounded(x_BTD, w_DF, sharding), (x_BTD, w_DF)


def _contract_rounded_backward(
  sharding: P | None, residuals: tuple[jax.Array, jax.Array], dy_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_BTD, w_DF = residuals
  if sharding is not None:
    dx_BTD = _einsum("btf,df->btd", dy_BTF, w_DF, _cotangent_spec(x_BTD))
    dw_DF = _einsum("btd,btf->df", x_BTD, dy_BTF, _cotangent_spec(w_DF))
  else:
    B, T, D = x_BTD.shape
    x_ZD, dy_ZF = x_BTD.reshape(B * T, D), dy_BTF.reshape(B * T, -1)
    dx_BTD = _einsum("zf,df->zd", dy_ZF, w_DF).reshape(B, T, D)
    dw_DF = _einsum("zd,zf->df", x_ZD, dy_ZF)
  return dx_BTD.astype(x_BTD.dtype), dw_DF.astype(w_DF.dtype)


_contract_rounded.defvjp(_contract_rounded_forward, _contract_rounded_backward)


def _einsum(letters: str, x: jax.Array, y: jax.Array, sharding: P | None = None) -> jax.Array:
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(letters, x, y, preferred_element_type=dtype, out_sharding=sharding)


def _cotangent_spec(x: jax.Array) -> P:
  """Returns how the cotangent of `x` is spread: unsummed over the axes that x is `reduced` over."""
  now = jax.typeof(x).sharding.spec
  return P(*now.partitions, unreduced=now.reduced)


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
