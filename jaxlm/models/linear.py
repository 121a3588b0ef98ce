"""Weights of linear maps: how they start, how they are sharded, and the one contraction that uses them."""

# B batch, T positions, D input width, F output width

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.rules import Names, all_gather, axes_in, is_sharded, shard, spec


def sharded_normal(
  key: jax.Array, shape: tuple[int, ...], std: float, *names: str | None
) -> jax.Array:
  """Normal float32 weights with this standard deviation, placed by their logical axis names."""
  return shard(std * jax.random.normal(key, shape, jnp.float32), *names)


def sharded_zeros(key: jax.Array, shape: tuple[int, ...], *names: str | None) -> jax.Array:
  """float32 biases at 0, placed by their logical axis names."""
  return shard(jnp.zeros(shape, jnp.float32), *names)


def linear(
  x_BTD: jax.Array, w_DF: jax.Array, weight: Names, out: Names, bias_F: jax.Array | None = None
) -> jax.Array:
  """x w + bias: [B, T, D] times [D, F] in x's dtype.

  `weight` names the weight's axes where it is used (gathered over the others), `out` those of the result. Where the
  contracted axis is split, the partial products are summed on the way to `out` (reduce-scatter). On one device B and T
  are merged: a weight gradient that contracts two axes makes XLA on CPU write transposed copies.
  """
  B, T, D = x_BTD.shape
  F = w_DF.shape[1]
  w_DF = all_gather(w_DF.astype(x_BTD.dtype), *weight)
  if not is_sharded():
    return add_bias(jnp.dot(x_BTD.reshape(B * T, D), w_DF).reshape(B, T, F), bias_F, out)
  partial = spec((B, T, F), "batch", "length", out[2])
  summed_axes = axes_in(spec((D,), weight[0]))
  y_BTF = jnp.einsum("btd,df->btf", x_BTD, w_DF, out_sharding=P(*partial, unreduced=summed_axes))
  return add_bias(shard(y_BTF, *out), bias_F, out)


def add_bias(x_BTF: jax.Array, bias_F: jax.Array | None, names: Names) -> jax.Array:
  """x + bias, in x's dtype. On a mesh as a product with ones, whose gradient may stay unsummed per device."""
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
