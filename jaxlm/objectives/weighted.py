"""Losses as sums: `Weighted(num, den)` adds over micro-batches, shards and hosts, and is divided once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Weighted(NamedTuple):
  """A sum of weighted terms and the sum of their weights, float32 scalars. `den` never depends on parameters."""

  num: jax.Array
  den: jax.Array

  def plus(self, other: Weighted) -> Weighted:
    return Weighted(self.num + other.num, self.den + other.den)

  def mean(self) -> jax.Array:
    """num / den, and 0 (with gradient 0) where nothing was counted."""
    return jnp.where(self.den > 0, self.num, 0.0) / jnp.where(self.den > 0, self.den, 1.0)
