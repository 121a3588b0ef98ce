"""Computes matmuls whose three products, the forward one and both gradients, are not plain."""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.config.quant import BlockwiseProduct, EmulatedProduct
from jaxlm.models.matmul import cotangent_spec, einsum
from jaxlm.quant.apply import quantize
from jaxlm.quant.turning import turn
from pallas_kernels.common.errors import UserError
from pallas_kernels.fp8_matmul import fp8_matmul
from sharding.rules import apply_undeferred


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def emulated(
  product: EmulatedProduct,
  key: jax.Array | None,
  x_BTD: jax.Array,
  w_DF: jax.Array,
  sharding: P | None,
) -> jax.Array:
  """Returns x w, float32 [B, T, F], of operands that are quantised along D.

  The gradients are dx = dy w^T, quantised along F, and dw = x^T dy, quantised along T, where
  `product.hadamard` rotates blocks of both by the same matrix. They multiply in the operands' type
  and add up in float32. `key` serves random rounding and the rotation's signs.
  """
  x_BTD = quantize(x_BTD, product.activation, 2)
  return einsum("btd,df->btf", x_BTD, quantize(w_DF, product.weight, 0), sharding)


def _forward(
  product: EmulatedProduct,
  key: jax.Array | None,
  x_BTD: jax.Array,
  w_DF: jax.Array,
  sharding: P | None,
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array, jax.Array]]:
  return emulated(product, key, x_BTD, w_DF, sharding), (key, x_BTD, w_DF)


def _backward(
  product: EmulatedProduct,
  sharding: P | None,
  residuals: tuple[jax.Array | None, jax.Array, jax.Array],
  dy_BTF: jax.Array,
) -> tuple[None, jax.Array, jax.Array]:
  key, x_BTD, w_DF = residuals
  dy_BTF = dy_BTF.astype(x_BTD.dtype)
  dx_sharding = dw_sharding = None
  if sharding is not None:
    dx_sharding, dw_sharding = cotangent_spec(x_BTD), cotangent_spec(w_DF)
  keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
  narrow_dy_BTF = quantize(dy_BTF, product.gradient, 2, key=keys[0])
  narrow_w_DF = quantize(w_DF, product.weight, 1)
  dx_BTD = einsum("btf,df->btd", narrow_dy_BTF, narrow_w_DF, dx_sharding)
  turned_x_BTD, turned_dy_BTF = x_BTD, dy_BTF
  if product.hadamard:
    turned_x_BTD, turned_dy_BTF = (_turn(a, product.hadamard, keys[1]) for a in (x_BTD, dy_BTF))
  narrow_x_BTD = quantize(turned_x_BTD, product.activation, 1)
  narrow_dy_BTF = quantize(turned_dy_BTF, product.gradient, 1, key=keys[2])
  dw_DF = einsum("btd,btf->df", narrow_x_BTD, narrow_dy_BTF, dw_sharding)
  return None, dx_BTD.astype(x_BTD.dtype), dw_DF.astype(w_DF.dtype)


emulated.defvjp(_forward, _backward)


def _turn(x_BTZ: jax.Array, n: int, key: jax.Array | None) -> jax.Array:
  """Rotates blocks of n tokens by H diag(signs) / sqrt(n), with signs that the key draws."""
  if key is None:
    raise UserError(f"product.hadamard={n}: draws signs, which needs the key of a training step")
  signs = jax.random.rademacher(key, (n,), jnp.float32)

  def turn_tokens(x_BTZ: jax.Array) -> jax.Array:
    return jnp.moveaxis(turn(jnp.moveaxis(x_BTZ, 1, 2), n, signs), 2, 1)

  return apply_undeferred(turn_tokens, x_BTZ)


def blockwise(
  product: BlockwiseProduct,
  key: jax.Array | None,
  x_BTD: jax.Array,
  w_DF: jax.Array,
  sharding: P | None,
) -> jax.Array:
  """Returns x w, float32 [B, T, F], of 8-bit codes; on a mesh each device has its own tiles."""
  if sharding is not None:
    x_BTD = jax.reshard(x_BTD, P(*sharding[:2], jax.typeof(w_DF).sharding.spec[0]))
  return fp8_matmul(x_BTD, w_DF, out_dtype=jnp.float32, **dataclasses.asdict(product))


PRODUCTS: dict[type, Callable] = {EmulatedProduct: emulated, BlockwiseProduct: blockwise}
"""Ways to compute a matmul with its gradients, by configuration.

Each is called with (configuration, key or None, x_BTD, w_DF, sharding) and returns y_BTF, as
`Contract` says. The key differs by layer and step; there is none outside of training.
"""
