"""Confines NaN and infinities to the positions that they reach by the recurrence.

A product over the positions of a chunk multiplies what a position must not see by 0, and 0 times
NaN is NaN. So chunks are computed without bad tokens, and NaN is put where it belongs afterwards.
"""

# B batch, T positions, H heads of queries and keys, N heads of values
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.terms import WIPE, GateParameters, Tokens


class Bad(NamedTuple):
  """Marks what holds NaN or infinities, bool [B, T, N], and [B, N] before the first position."""

  q_BTN: jax.Array
  k_BTN: jax.Array  # or one of the gates of the state and of the keys
  v_BTN: jax.Array  # or their gate
  state_BN: jax.Array

  @property
  def token_BTN(self) -> jax.Array:
    """Returns what is bad in any way."""
    return self.q_BTN | self.k_BTN | self.v_BTN


def clean(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array
) -> tuple[tuple[Tokens, GateParameters, jax.Array], Bad]:
  """Returns the inputs with 0 for what is not finite, and marks; a log decay may be -inf."""
  decay = tokens.decay
  decay = None if decay is None else jnp.maximum(decay, WIPE).astype(decay.dtype)
  tokens = tokens._replace(decay=decay)
  B, T, N, _ = tokens.v.shape

  def mark(*arrays: jax.Array | None) -> jax.Array:
    bad_BTN = jnp.zeros((1, 1, 1), bool)
    for x in arrays:
      if x is not None:
        bad = jnp.any(~jnp.isfinite(x), axis=-1)
        bad_BTN = bad_BTN | jnp.repeat(bad, N // bad.shape[-1], axis=-1)
    return jnp.broadcast_to(bad_BTN, (B, T, N))

  bad_gates_N = jnp.zeros(N, bool)
  for x in gate:
    if x is not None:
      bad_gates_N = bad_gates_N | jnp.any(~jnp.isfinite(x.reshape(N, -1)), axis=1)
  bad = Bad(
    q_BTN=mark(tokens.q),
    k_BTN=mark(tokens.k, tokens.decay, tokens.erase) | bad_gates_N[None, None],
    v_BTN=mark(tokens.v, tokens.write),
    state_BN=jnp.any(~jnp.isfinite(state_BNKV), axis=(2, 3)),
  )
  inputs = jax.tree.map(_zero_bad, (tokens._replace(reset=None), gate, state_BNKV))
  return (inputs[0]._replace(reset=tokens.reset), *inputs[1:]), bad


def reached_BTN(bad: Bad, reset_BT: jax.Array | None) -> jax.Array:
  """Marks the positions whose state a bad token has reached, bool [B, T, N]."""
  source_BTN = bad.k_BTN | bad.v_BTN
  at_T = jnp.arange(1, source_BTN.shape[1] + 1)[None, :, None]
  start_B1N = jnp.where(bad.state_BN, 0, -1)[:, None]
  last_bad_BTN = jax.lax.cummax(jnp.where(source_BTN, at_T, start_B1N), axis=1)
  if reset_BT is None:
    return last_bad_BTN >= 0
  last_reset_BT1 = jax.lax.cummax(jnp.where(reset_BT[..., None], at_T, 0), axis=1)
  return last_bad_BTN >= last_reset_BT1


def reached_backward(
  source_BTN: jax.Array, last_BN: jax.Array, reset_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Marks the positions [B, T, N], and [B, N] the initial state, whose gradient a source reaches.

  A source is a position whose output's gradient, query, key or gates are bad; `last_BN` marks the
  final state's.
  """
  T = source_BTN.shape[1]
  at_T = jnp.arange(T)[None, :, None]
  none_B1N = jnp.where(last_BN, T, T + 1)[:, None]
  next_bad_BTN = jax.lax.cummin(jnp.where(source_BTN, at_T, none_B1N), axis=1, reverse=True)
  if reset_BT is None:
    return next_bad_BTN <= T, next_bad_BTN[:, 0] <= T
  next_reset_BT1 = jnp.where(reset_BT[..., None], at_T, T + 1)
  next_reset_BT1 = jax.lax.cummin(next_reset_BT1, axis=1, reverse=True)
  after_BT1 = jnp.pad(next_reset_BT1[:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=T + 1)
  return next_bad_BTN < after_BT1, next_bad_BTN[:, 0] < next_reset_BT1[:, 0]


def all_finite(arrays: Any) -> jax.Array:
  """Tells whether no array of a tree holds NaN or infinities, bool []."""
  flat = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(arrays)]  # as kernels write them
  return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in flat])


def put_nan(x: Any, where: jax.Array) -> Any:
  """Returns x [B, T, heads, ...] or [B, heads, ...] with NaN at marks of N heads; None stays."""
  if x is None:
    return None
  heads = x.shape[where.ndim - 1]
  where = jnp.any(where.reshape(*where.shape[:-1], heads, -1), axis=-1)
  return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), jnp.nan, x)


def _zero_bad(x: jax.Array) -> jax.Array:
  return jnp.where(jnp.isfinite(x), x, 0)
