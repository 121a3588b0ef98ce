"""Computes RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

# Z any leading axes (batch, positions, heads), D normalised width

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models.linear import Roles
from pallas_kernels.common.checks import check_shape
from sharding.rules import all_gather, is_sharded


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def rms_norm(x_ZD: jax.Array, w_D: jax.Array, eps: float, offset: int) -> jax.Array:
  """Returns (offset + w) x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype.

  Everything is computed in float32. The backward pass keeps the arguments alone; automatic
  differentiation would have a scan keep three arrays of x's size in float32.
  """
  check_shape("w_D", w_D, x_ZD.shape[-1:])
  x32_ZD = x_ZD.astype(jnp.float32)
  unit_ZD = x32_ZD * jax.lax.rsqrt(jnp.mean(jnp.square(x32_ZD), axis=-1, keepdims=True) + eps)
  y_ZD = scale_features(unit_ZD, w_D)
  if offset:
    y_ZD = y_ZD + offset * unit_ZD
  return y_ZD.astype(x_ZD.dtype)


def scale_features(x_ZD: jax.Array, w_D: jax.Array) -> jax.Array:
  """Multiplies the last axis by w.

  On a mesh it is an einsum, the form whose weight gradient may stay unsummed per device.
  """
  if not is_sharded():
    return x_ZD * jnp.expand_dims(w_D, range(x_ZD.ndim - 1))
  sharding = jax.typeof(x_ZD).sharding.spec
  return jnp.einsum("...d,d->...d", x_ZD, w_D, out_sharding=sharding, precision="highest")


class RMSNorm(nn.Module):
  """Owns the weight [width], with which the norm starts as a factor of one."""

  width: int
  eps: float
  offset: int = 0

  def setup(self) -> None:
    """Declares the weight."""
    start = nn.initializers.constant(1 - self.offset)
    self.weight = self.param("weight", start, (self.width,), jnp.float32)

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return {"weight": "norm"}

  def __call__(self, x_ZD: jax.Array) -> jax.Array:
    """Norms the last axis; result in x's dtype."""
    return rms_norm(x_ZD, all_gather(self.weight, None), self.eps, self.offset)
