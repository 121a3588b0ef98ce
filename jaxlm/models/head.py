"""Holds the head of a decoder as an array, for losses that never hold all logits."""

# V vocabulary, D model

from __future__ import annotations

from typing import Literal, NamedTuple

import jax


class Head(NamedTuple):
  """Makes logits of the last states: their product with `weight`, softly capped."""

  weight: jax.Array
  """in the compute type; on a mesh gathered but for the vocabulary, and typed `reduced`"""
  layout: Literal["vd", "dv"]
  """the weight is [V, D], a tied embedding, or [D, V]"""
  cap: float | None
