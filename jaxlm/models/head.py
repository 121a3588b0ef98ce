"""The head of a decoder as an array, for losses that never hold all logits."""

# V vocabulary, D model

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from sharding.rules import all_gather


class Head(NamedTuple):
  """What makes logits of the last states: their product with `weight`, softly capped."""

  weight: jax.Array
  """in the compute type; on a mesh gathered but for the vocabulary, and typed `reduced`"""
  layout: Literal["vd", "dv"]
  """the weight is [V, D], a tied embedding, or [D, V]"""
  cap: float | None


def head(config: ModelConfig, params: Any) -> Head:
  """The head of `Transformer(config)` with these parameters."""
  weights, dtype = params["params"], jnp.dtype(config.dtype)
  if config.tied:
    return Head(all_gather(weights["embed"].astype(dtype), "vocab", None), "vd", config.logit_cap)
  return Head(all_gather(weights["head"].astype(dtype), None, "vocab"), "dv", config.logit_cap)
