"""Draws the next token from logits: temperature, top-k, top-p, min-p, in that order.

The order is that of transformers' generation and of vLLM: each filter sees the distribution that
the one before it left. Top-k: arXiv:1805.04833, section 5.4. Top-p (nucleus): arXiv:1904.09751,
section 3.1. Min-p: arXiv:2407.01082, section 3, whose experiments divide by the temperature first,
as here; a temperature above 1 then softens the cut. Tokens are removed by the logit -inf, filters
return float32, none ever removes the most likely token, and tokens with equal logits stay or go
together, so that no result hangs on the order of the vocabulary. All functions take float logits
[B, V] and raise UserError for others.
"""

# B batch, V vocabulary

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxlm.config import check
from pallas_kernels.common.checks import check_dtype, check_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """Says how the next token is chosen; hashable, hence static under jit.

  Raises UserError when a field is out of range.
  """

  temperature: float = 1.0
  """logits are divided by this; 0 takes the most likely token"""
  top_k: int = 0
  """keep the k most likely tokens; 0 keeps all"""
  top_p: float = 1.0
  """keep the most likely tokens until they hold this probability; 1 keeps all"""
  min_p: float = 0.0
  """keep tokens at least this times as probable as the most likely one; 0 keeps all"""

  def __post_init__(self) -> None:
    good = 0 <= self.temperature < math.inf
    check(good, "sampler.temperature", self.temperature, "must be finite and at least 0")
    check(self.top_k >= 0, "sampler.top_k", self.top_k, "must be at least 0")
    check(0 < self.top_p <= 1, "sampler.top_p", self.top_p, "must lie in (0, 1]")
    check(0 <= self.min_p <= 1, "sampler.min_p", self.min_p, "must lie in [0, 1]")


def sample(logits_BV: jax.Array, key: jax.Array, sampler: Sampler) -> jax.Array:
  """Returns one token per row, int32 [B], drawn independently.

  At temperature 0 the lowest id wins a tie. Where several logits are +inf, these share the
  probability. A row that is all -inf or has a NaN has no distribution; what comes back for it is
  some id of the vocabulary.
  """
  _check(logits_BV)
  if sampler.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = _subtract_max(logits_BV) / sampler.temperature
  logits_BV = apply_top_k(logits_BV, sampler.top_k)
  logits_BV = apply_top_p(logits_BV, sampler.top_p)
  logits_BV = apply_min_p(logits_BV, sampler.min_p)
  return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def apply_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
  """Keeps tokens whose logit is at least the k-th largest, more than k if some tie; 0 keeps all."""
  _check(logits_BV)
  logits_BV = logits_BV.astype(jnp.float32)
  if k == 0:
    return logits_BV
  largest_BK, _ = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
  return jnp.where(logits_BV >= largest_BK[..., -1:], logits_BV, -jnp.inf)


def apply_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
  """Keeps tokens when all strictly likelier ones together hold less than `p`; p = 1 keeps all.

  So the token that crosses `p` stays, and without ties the kept ones are the fewest that hold at
  least `p`.
  """
  _check(logits_BV)
  logits_BV = logits_BV.astype(jnp.float32)
  if p == 1:
    return logits_BV
  sorted_BV = jnp.sort(_subtract_max(logits_BV), axis=-1, descending=True)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  ahead_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  least_B1 = jnp.min(jnp.where(ahead_BV < p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(_subtract_max(logits_BV) >= least_B1, logits_BV, -jnp.inf)


def apply_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
  """Keeps tokens with probability at least `p` times the largest; p = 0 keeps all."""
  _check(logits_BV)
  logits_BV = logits_BV.astype(jnp.float32)
  if p == 0:
    return logits_BV
  return jnp.where(_subtract_max(logits_BV) >= math.log(p), logits_BV, -jnp.inf)


def _check(logits_BV: jax.Array) -> None:
  check_shape("logits_BV", logits_BV, (None, None))
  check_dtype("logits_BV", logits_BV, jnp.floating)


def _subtract_max(logits_BV: jax.Array) -> jax.Array:
  """Subtracts each row's largest logit in float32: exact near 1e4, finite where that is +inf."""
  logits_BV = logits_BV.astype(jnp.float32)
  max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  return jnp.where(logits_BV == max_B1, 0.0, logits_BV - max_B1)
