"""Generates with a cache: one prefill of the prompts, then a position at a time until rows end."""

# B batch, T positions of the padded prompts, D model, V vocabulary, M new tokens

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ComputeConfig, ModelConfig, check
from jaxlm.decode.sampling import Sampler, sample
from jaxlm.models import Transformer
from sharding.rules import shard, split_count

_SHORTEST_BUCKET = 16


class NoDistribution(FloatingPointError):
  """Raised where logits are NaN, or -inf for all ids, so that no token can be drawn from them."""


def generate(
  config: ModelConfig,
  params: Any,
  prompt_ids: Sequence[Sequence[int]] | np.ndarray,
  *,
  sampler: Sampler | None = None,
  max_new: int,
  key: jax.Array | None = None,
  eos: int | Sequence[int] | None = None,
  drawable_V: np.ndarray | None = None,
  compute: ComputeConfig | None = None,
) -> np.ndarray:
  """Continues every prompt by up to `max_new` tokens and returns int32 [B, max_new].

  Prompts may differ in length. Once a row has drawn `eos`, or one of several, the rest of it is the
  first `eos`, and no step is computed after all rows have ended. Only ids that are True in the
  boolean `drawable_V` are drawn, by default all. What a row draws depends on its prompt, its number
  and `key`, not on the other rows. Runs on the current mesh (`jax.set_mesh`). Compiles once for all
  lengths and `max_new` up to the same powers of two.

  Raises UserError for an empty prompt, ids or an `eos` outside the vocabulary, and max_new below 1;
  NoDistribution where the logits of a row are NaN, or -inf for all ids.
  """
  check(max_new >= 1, "max_new", max_new, "must be at least 1")
  rule = f"ids run from 0 to V - 1 = {config.V - 1}"
  ends = [] if eos is None else [eos] if isinstance(eos, int | np.integer) else list(eos)
  check(all(0 <= end < config.V for end in ends), "eos", eos, rule)
  if drawable_V is not None:
    rule = f"must have V={config.V} entries, not all of them False"
    good = drawable_V.shape == (config.V,) and bool(drawable_V.any())
    check(good, "drawable_V of shape", drawable_V.shape, rule)
  ids_BT, lengths_B = _pad_prompts(prompt_ids, config.V)
  generation = generate_tokens(
    Transformer(config, compute or ComputeConfig()),
    params,
    ids_BT,
    lengths_B,
    sampler=sampler or Sampler(),
    buffer=_bucket(max_new),
    max_new=max_new,
    eos=np.array(ends or [-1], np.int32),
    drawable_V=None if drawable_V is None or drawable_V.all() else drawable_V,
    key=jax.random.key(0) if key is None else key,
  )
  if (rows := np.flatnonzero(generation.undefined_B)).size:
    after = f"after {int(generation.steps) - 1} new tokens"
    raise NoDistribution(f"no distribution {after}: the logits of rows {rows.tolist()} are NaN")
  return np.asarray(generation.ids_BM)[: len(prompt_ids), :max_new]


def _pad_prompts(
  prompt_ids: Sequence[Sequence[int]] | np.ndarray, V: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids [B, T] and the length of each row, with B and T that the current mesh can split.

  Rows that are added have length 0.
  """
  lengths = [len(prompt) for prompt in prompt_ids]
  rule = "every prompt needs at least one token"
  check(bool(lengths) and min(lengths) >= 1, "prompt_ids", lengths, rule)
  B = _next_multiple(len(lengths), split_count("batch"))
  ids_BT = np.zeros((B, _bucket(max(lengths))), np.int32)
  for row, prompt in zip(ids_BT, prompt_ids):
    row[: len(prompt)] = prompt
  for extreme in (int(ids_BT.min()), int(ids_BT.max())):
    check(0 <= extreme < V, "prompt_ids", extreme, f"ids run from 0 to V - 1 = {V - 1}")
  return ids_BT, np.array(lengths + [0] * (B - len(lengths)), np.int32)


class Generation(NamedTuple):
  """Holds what has been generated so far, on every device."""

  ids_BM: jax.Array
  """int32; the first `eos` where nothing has been drawn yet"""
  ended_B: jax.Array
  """whether the row has drawn an end, or has no distribution"""
  undefined_B: jax.Array
  """whether the row's logits are NaN, or -inf for all ids that may be drawn"""
  steps: jax.Array
  """tokens drawn per row, which is one more than the decoding steps that were computed"""


@functools.partial(jax.jit, static_argnames=("model", "sampler", "buffer"))
def generate_tokens(
  model: Transformer,
  params: Any,
  ids_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  sampler: Sampler,
  buffer: int,
  max_new: jax.Array | int,
  eos: jax.Array | np.ndarray,
  key: jax.Array,
  drawable_V: jax.Array | np.ndarray | None = None,
) -> Generation:
  """Continues row b, which has `lengths_B[b]` ids followed by padding, by up to `max_new` tokens.

  A row of length 0 has ended from the start. `buffer` >= `max_new` is the width of the result.
  Stops as soon as all rows have drawn one of the ids `eos` (int32 [E]; -1: never), or as a row has
  no distribution.
  """
  B, T = ids_BT.shape
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
  cache = model.init_cache(B, T + buffer)
  logits_BV, cache = prefill(model, params, ids_BT, lengths_B, cache)

  def draw(logits_BV: jax.Array, so_far: Generation) -> Generation:
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, so_far.steps)
    logits_BV = shard(logits_BV, None, None)  # all devices draw all rows
    if drawable_V is not None:
      logits_BV = jnp.where(drawable_V[None], logits_BV, -jnp.inf)
    nothing_B = jnp.any(jnp.isnan(logits_BV), axis=-1) | jnp.all(logits_BV == -jnp.inf, axis=-1)
    undefined_B = nothing_B & ~so_far.ended_B
    ids_B = jnp.where(so_far.ended_B, eos[0], sample_rows(logits_BV, step_keys_B, sampler))
    ids_BM = so_far.ids_BM.at[:, so_far.steps].set(ids_B)
    ended_B = so_far.ended_B | undefined_B | jnp.any(ids_B[:, None] == eos[None], axis=1)
    return Generation(ids_BM, ended_B, undefined_B, so_far.steps + 1)

  def unfinished(carry: tuple[Generation, Any]) -> jax.Array:
    so_far, _ = carry
    going_on = ~jnp.all(so_far.ended_B) & ~jnp.any(so_far.undefined_B)
    return (so_far.steps < max_new) & going_on

  def step(carry: tuple[Generation, Any]) -> tuple[Generation, Any]:
    so_far, cache = carry
    ids_B1 = so_far.ids_BM[:, so_far.steps - 1][:, None]
    positions_B1 = (lengths_B + so_far.steps - 1)[:, None]
    logits_B1V, cache = model.apply(params, ids_B1, positions=positions_B1, cache=cache)
    return draw(logits_B1V[:, 0], so_far), cache

  eos = jnp.asarray(eos)
  empty_BM = jnp.full((B, buffer), eos[0], jnp.int32)
  start = Generation(empty_BM, lengths_B == 0, jnp.zeros(B, bool), jnp.int32(0))
  generation, _ = jax.lax.while_loop(unfinished, step, (draw(logits_BV, start), cache))
  return generation


def prefill(
  model: Transformer, params: Any, ids_BT: jax.Array, lengths_B: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
  """Writes the prompts into an empty cache; returns the logits [B, V] of each row's last position.

  Row b has `lengths_B[b]` ids; the padding after them is written nowhere. The head multiplies one
  position per row.
  """
  t_1T = jnp.arange(ids_BT.shape[1])[None]
  positions_BT = jnp.where(t_1T < lengths_B[:, None], t_1T, -1)
  x_BTD, cache = model.run_layers(params, ids_BT, positions=positions_BT, cache=cache)
  is_last_BT = shard(t_1T == lengths_B[:, None] - 1, "batch", "norm_length")
  x_B1D = jnp.sum(jnp.where(is_last_BT[..., None], x_BTD, 0), axis=1, keepdims=True)
  return model.finish(params, x_B1D)[:, 0], cache


def sample_rows(logits_BV: jax.Array, keys_B: jax.Array, sampler: Sampler) -> jax.Array:
  """Draws one token per row, int32 [B], each with a key of its own."""
  draw = jax.vmap(lambda logits_1V, key: sample(logits_1V, key, sampler)[0])
  return draw(logits_BV[:, None], keys_B)


def _bucket(size: int) -> int:
  """Returns the next power of two, of at least 16, that the current mesh can split."""
  power = max(_SHORTEST_BUCKET, 1 << (size - 1).bit_length())
  return _next_multiple(power, split_count("norm_length"))


def _next_multiple(size: int, parts: int) -> int:
  return -(-size // parts) * parts
