"""Expresses losses as sums: `Weighted(num, den)` adds over micro-batches, shards and hosts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighted:
  """Holds one term of an objective: a sum over a batch and what it is divided by.

  What is minimised is the sum over all terms of weight * num / den, each over the whole batch.
  """

  num: jax.Array
  """float32 scalar; an array is allowed where the weight is 0"""
  den: jax.Array
  """float32 scalar, never a function of the parameters: tokens, sequences, layers"""
  weight: float = dataclasses.field(default=1.0, metadata={"static": True})
  """static factor of num / den in what is minimised; 0 makes the term a metric only"""

  def plus(self, other: Weighted) -> Weighted:
    """Returns the term over both batches."""
    return Weighted(self.num + other.num, self.den + other.den, self.weight)

  def mean(self) -> jax.Array:
    """Returns num / den, and 0 (with gradient 0) where nothing was counted."""
    return jnp.where(self.den > 0, self.num, 0.0) / jnp.where(self.den > 0, self.den, 1.0)
