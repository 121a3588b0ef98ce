"""Empty caches for decoding."""

# L layers of one stack, B batch, S cached positions, K key heads, H head width

import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.models.attention import KVCache


def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, KVCache]:
  """Room for `length` positions of `batch` rows in every layer; keys and values in the compute dtype.

  2 layers B S K H numbers in all; a "window" layer keeps all positions too.
  """
  shape_LBSKH = (config.layers // len(config.attention), batch, length, config.K, config.H)
  zeros = jnp.zeros(shape_LBSKH, config.dtype)
  return {str(i): KVCache(zeros, zeros) for i in range(len(config.attention))}
