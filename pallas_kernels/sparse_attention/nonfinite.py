"""Keeps NaN and infinity in keys and values from queries that do not see them, and the other way.

A weight of 0 times NaN is NaN. Where products cover more keys than a query sees, these arrays are
multiplied with 0 in place of what is not finite, and the queries that do see such get NaN. So do
the gradients of the keys that a query with NaN, or with NaN in its output's gradient, sees.
"""

# B batch, T query positions, S key positions, K key heads, Z width, H width of queries, U of values
from __future__ import annotations

import jax
import jax.numpy as jnp


def hide(x_BSKZ: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the array with 0 for what is not finite, and where that was, bool [B, S, K]."""
  finite_BSKZ = jnp.isfinite(x_BSKZ)
  return jnp.where(finite_BSKZ, x_BSKZ, 0), ~jnp.all(finite_BSKZ, axis=-1)


def hide_rows(
  q: jax.Array, do: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries [..., H] and gradients [..., U] with 0 in bad rows, and which rows are, bool.

  A row is bad where it is not finite in either, or its logsumexp [...] is NaN. If the backward pass
  makes the probabilities of the keys that such a row sees not finite, and 0 of all others, then
  what is not finite goes to the gradients of these keys and no others.
  """
  finite = jnp.all(jnp.isfinite(q), axis=-1) & jnp.all(jnp.isfinite(do), axis=-1)
  bad = ~finite | jnp.isnan(lse)
  q, do = (jnp.where(bad[..., None], 0, x) for x in (q, do))
  return q, do, bad


def any_within(bad_BSK: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
  """Returns whether any of the keys [first, end) is bad, bool of the shape of `first` and `end`.

  Both are integers [B, T, K, ...] in 0 .. S; nothing is within where `end` is not above `first`.
  """
  B, _, K = bad_BSK.shape
  count_BSK = jnp.cumsum(bad_BSK, axis=1, dtype=jnp.int32)
  count_BKS = jnp.pad(count_BSK, ((0, 0), (1, 0), (0, 0))).swapaxes(1, 2)

  def counts(at: jax.Array) -> jax.Array:
    at_BKX = jnp.moveaxis(at, 2, 1).reshape(B, K, -1)
    shape = (B, K, at.shape[1], *at.shape[3:])
    return jnp.moveaxis(jnp.take_along_axis(count_BKS, at_BKX, axis=2).reshape(shape), 1, 2)

  return (end > first) & (counts(end) > counts(first))


def mark(
  o_BTNU: jax.Array, bad_BSK: jax.Array, first_BT: jax.Array, end_BT: jax.Array
) -> jax.Array:
  """Returns the output with NaN for queries that see a bad key among [first, end).

  Also their gradients become NaN.
  """
  B, T, N, _ = o_BTNU.shape
  K = bad_BSK.shape[2]
  first, end = (jnp.broadcast_to(at_BT[:, :, None], (B, T, K)) for at_BT in (first_BT, end_BT))
  factor_BTK = jnp.where(any_within(bad_BSK, first, end), jnp.nan, 1).astype(o_BTNU.dtype)
  return o_BTNU * jnp.repeat(factor_BTK, N // K, axis=2)[..., None]
