"""Computes matmuls whose three products, the forward one and both gradients, are not plain."""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from jaxlm.config.quant import EmulatedProduct
from jaxlm.models.matmul import cotangent_spec, einsum
from jaxlm.quant.apply import quantize


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def emulated(
  product: EmulatedProduct, x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None
) -> jax.Array:
  """Returns x w, float32 [B, T, F], of operands that are quantised along D.

  The gradients are dx = dy w^T, quantised along F, and dw = x^T dy, quantised along T. They
  multiply in the operands' type and add up in float32.
  """
  x_BTD = quantize(x_BTD, product.activation, 2)
  return einsum("btd,df->btf", x_BTD, quantize(w_DF, product.weight, 0), sharding)


def _forward(
  product: EmulatedProduct, x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return emulated(product, x_BTD, w_DF, sharding), (x_BTD, w_DF)


def _backward(
  product: EmulatedProduct,
  sharding: P | None,
  residuals: tuple[jax.Array, jax.Array],
  dy_BTF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x_BTD, w_DF = residuals
  dy_BTF = dy_BTF.astype(x_BTD.dtype)
  dx_sharding = dw_sharding = None
  if sharding is not None:
    dx_sharding, dw_sharding = cotangent_spec(x_BTD), cotangent_spec(w_DF)
  w_narrow_DF = quantize(w_DF, product.weight, 1)
  dx_BTD = einsum("btf,df->btd", quantize(dy_BTF, product.gradient, 2), w_narrow_DF, dx_sharding)
  x_narrow_BTD = quantize(x_BTD, product.activation, 1)
  dw_DF = einsum("btd,btf->df", x_narrow_BTD, quantize(dy_BTF, product.gradient, 1), dw_sharding)
  return dx_BTD.astype(x_BTD.dtype), dw_DF.astype(w_DF.dtype)


emulated.defvjp(_forward, _backward)


PRODUCTS: dict[type, Callable] = {EmulatedProduct: emulated}
"""Ways to compute a matmul with its gradients, by configuration.

Each is called with (configuration, x_BTD, w_DF, sharding) and returns y_BTF, as `Contract` says.
"""
