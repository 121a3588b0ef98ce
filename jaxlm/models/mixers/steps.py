"""Orders the tokens of a cached call, so that a recurrence meets them one after another.

A call may have padding (position -1) in any column. Recurrent states and convolutions go on from
the token before: the functions here bring a row's tokens to its front and results back to their
columns. They take one device's shards.
"""

# B batch, T columns of a call, P inputs remembered, S = P + T, Z any further axes

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LOST = -(2**30)


class Steps(NamedTuple):
  """Says which columns of a call hold tokens, and whether these go on where the cache ended."""

  order_BT: jax.Array
  """column of each row's i-th token; after the tokens come the columns of padding"""
  count_B: jax.Array
  """tokens of each row"""
  is_token_BT: jax.Array
  """whether there is an i-th token"""
  first_B: jax.Array
  """position of each row's first token, as the cache has it"""
  follows_BT: jax.Array
  """whether the i-th token stands where the token before it says"""

  @property
  def seen_B(self) -> jax.Array:
    """Returns the position after the last token; below all positions once tokens did not follow."""
    good_B = jnp.all(self.follows_BT | ~self.is_token_BT, axis=1)
    return jnp.where(good_B, self.first_B + self.count_B, _LOST)


def order_steps(positions_BT: jax.Array, seen_B: jax.Array) -> Steps:
  """Returns how the tokens of a call stand, given the position that comes next in each row."""
  order_BT = jnp.argsort(positions_BT < 0, axis=1, stable=True)
  count_B = jnp.sum(positions_BT >= 0, axis=1, dtype=jnp.int32)
  index_1T = jnp.arange(positions_BT.shape[1], dtype=jnp.int32)[None]
  positions_BT = jnp.take_along_axis(positions_BT, order_BT, axis=1)
  follows_BT = positions_BT == seen_B[:, None] + index_1T
  return Steps(order_BT, count_B, index_1T < count_B[:, None], seen_B, follows_BT)


def bring_to_front(x_BTZ: jax.Array, steps: Steps) -> jax.Array:
  """Returns [B, T, ...] with each row's tokens at its front, in order."""
  return x_BTZ if x_BTZ.shape[1] == 1 else _take(x_BTZ, steps.order_BT)


def bring_back(x_BTZ: jax.Array, steps: Steps) -> jax.Array:
  """Undoes `bring_to_front`. What stands where no token should be is NaN."""
  good_BT = steps.follows_BT | ~steps.is_token_BT
  x_BTZ = jnp.where(_expand(good_BT, x_BTZ.ndim), x_BTZ, jnp.nan)
  return x_BTZ if x_BTZ.shape[1] == 1 else _take(x_BTZ, jnp.argsort(steps.order_BT, axis=1))


def join(before_BPZ: jax.Array, x_BTZ: jax.Array) -> jax.Array:
  """Returns what a row remembers of its last inputs and, after it, those of this call."""
  return jnp.concatenate((before_BPZ, x_BTZ.astype(before_BPZ.dtype)), axis=1)


def last_inputs(joined_BSZ: jax.Array, steps: Steps) -> jax.Array:
  """Returns the inputs before the next position, [B, P, ...], of what `join` returned."""
  P = joined_BSZ.shape[1] - steps.order_BT.shape[1]
  return _take(joined_BSZ, steps.count_B[:, None] + jnp.arange(P, dtype=jnp.int32)[None])


def write_places(cached: Any, new: Any, at_BT: jax.Array) -> Any:
  """Writes each row's entries at these places of all arrays [B, S, ...], those at -1 nowhere."""
  rows_B1 = jnp.arange(len(at_BT))[:, None]

  def write(cached_BSZ: jax.Array, x_BTZ: jax.Array) -> jax.Array:
    places_BT = jnp.where(at_BT < 0, cached_BSZ.shape[1], at_BT)
    return cached_BSZ.at[rows_B1, places_BT].set(x_BTZ.astype(cached_BSZ.dtype), mode="drop")

  return jax.tree.map(write, cached, new)


def mask_padding(x_BTZ: jax.Array, steps: Steps) -> jax.Array:
  """Returns x, tokens at the front, with zeros in place of padding."""
  return jnp.where(_expand(steps.is_token_BT, x_BTZ.ndim), x_BTZ, 0)


def _take(x_BTZ: jax.Array, columns_BT: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BTZ, _expand(columns_BT, x_BTZ.ndim), axis=1)


def _expand(x_BT: jax.Array, ndim: int) -> jax.Array:
  return jnp.expand_dims(x_BT, range(2, ndim))
