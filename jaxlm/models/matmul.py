"""Multiplies activations by a weight; says how the product is sharded, summed and rounded.

Products accumulate in float32 and are cast to the compute type. Where `tensor` splits the
contracted axis, the devices' partial products are summed in the compute type.
"""

# B batch, T positions, D input width, F output width, Z = B T tokens

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sharding.rules import Names, axes_in, is_sharded, manual_axes, shard, spec

Contract = Callable[[jax.Array, jax.Array, P | None], jax.Array]
"""(x [B, T, D], w [D, F], sharding of the result on a mesh) -> y [B, T, F], with its gradients"""


def matmul(
  x_BTD: jax.Array,
  w_DF: jax.Array,
  axes: Names,
  out: Names,
  dtype: str | jnp.dtype,
  contract: Contract | None = None,
) -> jax.Array:
  """Contracts [B, T, D] with [D, F] in float32 and returns [B, T, F] in `dtype`.

  `axes` are the logical axes of `w_DF`, `out` those of the result. Where D is split, the partial
  products are summed on the way to `out` (reduce-scatter), whose T is then "norm_length".
  `contract` computes the product and its gradients in place of the plain contraction.
  """
  B, T, D = x_BTD.shape
  sharding = None
  if is_sharded():
    summed = axes_in(spec((D,), axes[0]))
    partial = spec((B, T, w_DF.shape[1]), "batch", "length" if summed else out[1], out[2])
    sharding = P(*partial, unreduced=summed)
  rounds = x_BTD.dtype == jnp.dtype(dtype) and x_BTD.dtype.itemsize < 4
  contract = contract or (_contract_rounded if rounds else _contract)
  y_BTF = contract(x_BTD, w_DF, sharding).astype(dtype)
  if summed_here := manual_axes(axes[0]):
    y_BTF = jax.lax.psum_scatter(y_BTF, summed_here, scatter_dimension=1, tiled=True)
  else:
    y_BTF = shard(y_BTF, *out)
  return checkpoint_name(y_BTF, "product")


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _contract(x_BTD: jax.Array, w_DF: jax.Array, sharding: P | None) -> jax.Array:
  """Contracts in float32, or in a wider type of the arguments; the backward pass keeps these alone.

  Products of one input so keep it once. On one device B and T are merged: a weight gradient that
  contracts two axes makes XLA on CPU write transposed copies.
  """
  if sharding is not None:
    return einsum("btd,df->btf", x_BTD, w_DF, sharding)
  B, T, D = x_BTD.shape
  return einsum("zd,df->zf", x_BTD.reshape(B * T, D), w_DF).reshape(B, T, w_DF.shape[1])


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
    dx_BTD = einsum("btf,df->btd", dy_BTF, w_DF, cotangent_spec(x_BTD))
    dw_DF = einsum("btd,btf->df", x_BTD, dy_BTF, cotangent_spec(w_DF))
  else:
    B, T, D = x_BTD.shape
    x_ZD, dy_ZF = x_BTD.reshape(B * T, D), dy_BTF.reshape(B * T, -1)
    dx_BTD = einsum("zf,df->zd", dy_ZF, w_DF).reshape(B, T, D)
    dw_DF = einsum("zd,zf->df", x_ZD, dy_ZF)
  return dx_BTD.astype(x_BTD.dtype), dw_DF.astype(w_DF.dtype)


_contract_rounded.defvjp(_contract_rounded_forward, _contract_rounded_backward)


def einsum(letters: str, x: jax.Array, y: jax.Array, sharding: P | None = None) -> jax.Array:
  """Contracts in float32, or in a wider type of the arguments."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(letters, x, y, preferred_element_type=dtype, out_sharding=sharding)


def cotangent_spec(x: jax.Array) -> P:
  """Returns how the cotangent of `x` is spread: unsummed over the axes that x is `reduced` over."""
  now = jax.typeof(x).sharding.spec
  return P(*now.partitions, unreduced=now.reduced)
