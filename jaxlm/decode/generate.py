"""Cached generation: one prefill of the prompts, then one position at a time."""

# B batch, T prompt positions, V vocabulary, M new tokens

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ComputeConfig, ModelConfig, check
from jaxlm.decode.sampling import Sampler, sample
from jaxlm.models import Transformer


def generate(
  config: ModelConfig,
  params: Any,
  prompt_ids: Sequence[Sequence[int]] | np.ndarray,
  *,
  sampler: Sampler | None = None,
  max_new: int,
  key: jax.Array | None = None,
  eos: int | None = None,
  compute: ComputeConfig | None = None,
) -> np.ndarray:
  """Continues every prompt by `max_new` tokens: int32 [B, max_new].

  Prompts may differ in length. Once a row has drawn `eos`, the rest of it is `eos`. Raises ValueError for an empty
  prompt, ids outside the vocabulary, and max_new below 1.
  """
  check(max_new >= 1, "max_new", max_new, "must be at least 1")
  lengths = [len(prompt) for prompt in prompt_ids]
  check(
    bool(lengths) and min(lengths) >= 1,
    "prompt_ids",
    lengths,
    "every prompt needs at least one token",
  )
  ids_BT = np.zeros((len(lengths), max(lengths)), np.int32)
  for row, prompt in zip(ids_BT, prompt_ids):
    row[: len(prompt)] = prompt
  for extreme in (int(ids_BT.min()), int(ids_BT.max())):
    check(
      0 <= extreme < config.V, "prompt_ids", extreme, f"ids run from 0 to V - 1 = {config.V - 1}"
    )
  key = jax.random.key(0) if key is None else key
  model = Transformer(config, compute or ComputeConfig())
  lengths_B = jnp.array(lengths, jnp.int32)
  return np.asarray(
    _generate(model, sampler or Sampler(), max_new, eos, params, ids_BT, lengths_B, key)
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
  model: Transformer,
  sampler: Sampler,
  max_new: int,
  eos: int | None,
  params,
  ids_BT,
  lengths_B,
  key,
):
  B, T = ids_BT.shape
  cache = model.init_cache(B, T + max_new)
  positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  # Slots behind a short prompt hold padding until decoding overwrites them; no query looks ahead of its position.
  logits_BTV, cache = model.apply(params, ids_BT, positions=positions_BT, cache=cache)
  logits_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]

  def draw(
    logits_BV: jax.Array, index: jax.Array, done_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    ids_B = sample(logits_BV, jax.random.fold_in(key, index), sampler)
    if eos is None:
      return ids_B, done_B
    ids_B = jnp.where(done_B, eos, ids_B)
    return ids_B, done_B | (ids_B == eos)

  def step(carry, index):
    ids_B, done_B, cache = carry
    positions_B1 = (lengths_B + index - 1)[:, None]
    logits_B1V, cache = model.apply(params, ids_B[:, None], positions=positions_B1, cache=cache)
    ids_B, done_B = draw(logits_B1V[:, 0], index, done_B)
    return (ids_B, done_B, cache), ids_B

  first_B, done_B = draw(logits_BV, jnp.int32(0), jnp.zeros(B, bool))
  _, rest_MB = jax.lax.scan(step, (first_B, done_B, cache), jnp.arange(1, max_new))
  return jnp.concatenate([first_B[:, None], rest_MB.T], axis=1)
