"""Computes delta attention chunk by chunk in plain JAX, forward and backward.

A scan over the chunks holds one chunk of all heads at a time. For the backward pass only the
states at the chunks' starts are saved; everything else of a chunk is computed again.
"""

# B batch, T positions, N heads of values, K width of keys, V width of values, C positions of a
# chunk, J chunks
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.delta_attention.chunk import attend_to_chunk
from pallas_kernels.delta_attention.terms import (
  WIPE,
  Gated,
  GateParameters,
  Options,
  Tokens,
  apply_gates,
)

CHUNK = 64


def forward(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array, options: Options, *, save: bool
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns the output [B, T, N, V], the final state and, to be saved, the chunks' first states."""
  T, C = tokens.q.shape[1], chunk_length(tokens)
  padded = _padded(tokens, C)

  def step(state_BNKV: jax.Array, start: jax.Array):
    chunk = _slice(padded, start, C)
    o_BCNV, next_BNKV = _attend(chunk, gate, state_BNKV, T - start, options)
    return next_BNKV, (o_BCNV.astype(tokens.v.dtype), state_BNKV if save else None)

  last_BNKV, (o_JBCNV, states_JBNKV) = jax.lax.scan(step, state_BNKV, jnp.arange(0, T, C))
  return _merge(o_JBCNV, T), last_BNKV, states_JBNKV


def backward(
  tokens: Tokens,
  gate: GateParameters,
  states_JBNKV: jax.Array,
  do_BTNV: jax.Array,
  dstate_BNKV: jax.Array,
  options: Options,
) -> tuple[Tokens, GateParameters, jax.Array]:
  """Returns the gradients of tokens, gate and initial state, in their dtypes."""
  T, C = tokens.q.shape[1], chunk_length(tokens)
  padded, do_BTNV = _padded((tokens, do_BTNV), C)

  def step(carry: Any, at: tuple[jax.Array, jax.Array]):
    dstate_BNKV, dgate = carry
    start, state_BNKV = at
    chunk, do_BCNV = _slice((padded, do_BTNV), start, C)
    attend = functools.partial(_attend, remaining=T - start, options=options)
    (o_BCNV, _), pull = jax.vjp(attend, chunk, gate, state_BNKV)
    dchunk, dgate_here, dstate_BNKV = pull((do_BCNV.astype(o_BCNV.dtype), dstate_BNKV))
    dchunk = dchunk._replace(reset=None)
    return (dstate_BNKV, jax.tree.map(jnp.add, dgate, dgate_here)), dchunk

  zero_gate = jax.tree.map(lambda x: zeros_varying_like(x.shape, x.dtype, x), gate)
  starts_J = jnp.arange(0, T, C)
  carry = dstate_BNKV, zero_gate
  carry, dtokens = jax.lax.scan(step, carry, (starts_J, states_JBNKV), reverse=True)
  dstate_BNKV, dgate = carry
  return jax.tree.map(lambda x: _merge(x, T), dtokens), dgate, dstate_BNKV


def chunk_length(tokens: Tokens) -> int:
  """Returns the positions of a chunk, a power of two."""
  return min(CHUNK, 1 << (tokens.q.shape[1] - 1).bit_length())


def _attend(
  chunk: Tokens,
  gate: GateParameters,
  state_BNKV: jax.Array,
  remaining: jax.Array,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Returns the chunk's output [B, C, N, V] and the state after it."""
  B, N, K, V = state_BNKV.shape
  gated = gate_tokens(chunk, gate, remaining, options)
  o, state = jax.vmap(attend_to_chunk)(gated, state_BNKV.reshape(B * N, K, V))
  return o.reshape(B, N, -1, V).swapaxes(1, 2), state.reshape(B, N, K, V)


def gate_tokens(
  tokens: Tokens, gate: GateParameters, remaining: jax.Array | int, options: Options
) -> Gated:
  """Returns tokens after norm, gates and resets, [B * N, T, K, V or 1].

  Positions from `remaining` on are padding: their keys are 0, and here their decay is.
  """
  gated = apply_gates(tokens, gate, options)
  T, decay = tokens.q.shape[1], gated.decay
  if tokens.reset is not None:
    decay = jnp.zeros((1, T, 1, 1), gated.q.dtype) if decay is None else decay
    wipe_BT = jnp.where(tokens.reset, WIPE, 0.0).astype(decay.dtype)
    decay = decay + wipe_BT[:, :, None, None]
  if decay is not None:
    exists_T11 = (jnp.arange(T) < remaining)[:, None, None]
    decay = jnp.where(exists_T11[None], decay, 0)
    decay = jnp.broadcast_to(decay, (*gated.v.shape[:3], decay.shape[3]))
  # rows and heads in one axis: XLA on CPU crashes in products with a leading axis of 1
  B, _, N, _ = gated.v.shape
  return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(B * N, T, -1), gated._replace(decay=decay))


def _slice(tree: Any, start: jax.Array, C: int) -> Any:
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, C, axis=1), tree)


def _padded(tree: Any, C: int) -> Any:
  return jax.tree.map(lambda x: pad_axis(x, round_up(x.shape[1], C), 1), tree)


def _merge(x_JBC: jax.Array, T: int) -> jax.Array:
  """Merges [J, B, C, ...] to [B, T, ...], without the last chunk's padding."""
  x_BJC = jnp.moveaxis(x_JBC, 0, 1)
  return x_BJC.reshape(x_BJC.shape[0], -1, *x_BJC.shape[3:])[:, :T]
