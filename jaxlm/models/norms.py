"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

# Z any leading axes (batch, positions, heads), D normalised width

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from sharding.rules import all_gather, is_sharded


def rms_norm(x_ZD: jax.Array, w_D: jax.Array, eps: float, offset: int = 0) -> jax.Array:
  """(offset + w) x / sqrt(mean(x^2) + eps) over the last axis; all in float32, result in x's dtype."""
  x32_ZD = x_ZD.astype(jnp.float32)
  unit_ZD = x32_ZD * jax.lax.rsqrt(jnp.mean(jnp.square(x32_ZD), axis=-1, keepdims=True) + eps)
  y_ZD = scale_features(unit_ZD, w_D)
  if offset:
    y_ZD = y_ZD + offset * unit_ZD
  return y_ZD.astype(x_ZD.dtype)


def scale_features(x_ZD: jax.Array, w_D: jax.Array) -> jax.Array:
  """x w along the last axis. On a mesh as an einsum, the form whose weight gradient may stay unsummed per device."""
  if not is_sharded():
    return x_ZD * jnp.expand_dims(w_D, range(x_ZD.ndim - 1))
  sharding = jax.typeof(x_ZD).sharding.spec
  return jnp.einsum("...d,d->...d", x_ZD, w_D, out_sharding=sharding, precision="highest")


class RMSNorm(nn.Module):
  """Owns the weight [D], with which the norm starts as a factor of one."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_ZD: jax.Array) -> jax.Array:
    c = self.config
    start = nn.initializers.constant(1 - c.norm_offset)
    w_D = self.param("w_D", start, x_ZD.shape[-1:], jnp.float32)
    return rms_norm(x_ZD, all_gather(w_D, None), c.norm_eps, c.norm_offset)
