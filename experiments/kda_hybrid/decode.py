"""Times one more token after a context, and counts the bytes of the cache that it reads."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ModelConfig
from jaxlm.models import Transformer

_TOKENS, _UNTIMED = 24, 4


def measure_decode(model: ModelConfig, context: int, dtype: str) -> dict[str, float]:
  """Returns "bytes" of a row's cache and "milliseconds" of a token after `context` others.

  Keys, values and states are zeros, on which neither depends. The time is the least of 20 tokens,
  which others on the machine disturb least.
  """
  transformer = Transformer(model, ComputeConfig(dtype=dtype))
  params = jax.jit(transformer.init)(jax.random.key(0))
  first = context - _TOKENS

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(params: Any, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
    ids_11, at_11 = jnp.zeros((1, 1), jnp.int32), at[None, None]
    logits_11V, cache = transformer.apply(params, ids_11, positions=at_11, cache=cache)
    return jnp.argmax(logits_11V), cache

  # integers of a cache count the positions before the next
  cache = jax.tree.map(
    lambda x: jnp.full_like(x, first if jnp.issubdtype(x.dtype, jnp.integer) else 0),
    transformer.init_cache(1, context),
  )
  size = sum(x.nbytes for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating))
  seconds = []
  for at in range(first, context):
    began = time.perf_counter()
    chosen, cache = decode(params, cache, jnp.int32(at))
    jax.block_until_ready((chosen, cache))
    seconds.append(time.perf_counter() - began)
  return {"bytes": size, "milliseconds": round(1e3 * min(seconds[_UNTIMED:]), 4)}
