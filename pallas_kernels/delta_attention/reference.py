"""Computes delta attention token by token; every other implementation is compared with it."""

# B batch, T positions, N heads of values, K width of keys, V width of values
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.terms import Gated, GateParameters, Options, Tokens, apply_gates


def attend(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, V] and the final state [B, N, K, V] in the state's dtype."""
  gated = apply_gates(tokens, gate, options)

  def step(state_BNKV: jax.Array, token: tuple[Gated, jax.Array | None]):
    gated, reset_B = token
    if reset_B is not None:
      state_BNKV = jnp.where(reset_B[:, None, None, None], 0, state_BNKV)
    o_BNV, state_BNKV = update(gated, state_BNKV)
    return state_BNKV, o_BNV

  by_position = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (gated, tokens.reset))
  state_BNKV, o_TBNV = jax.lax.scan(step, state_BNKV, by_position)
  return jnp.moveaxis(o_TBNV, 0, 1).astype(tokens.v.dtype), state_BNKV


def update(gated: Gated, state_BNKV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, N, V] of one token of each row, and the state after it.

  S~ = exp(g) S        S' = S~ + k (w v - S~^T (b k))^T        o = S'^T q
  """
  dot_precision = jax.lax.Precision.HIGHEST
  if gated.decay is not None:
    state_BNKV = jnp.exp(gated.decay)[..., None] * state_BNKV
  added_BNV = gated.v
  if gated.erased_k is not None:
    read_BNV = jnp.einsum("bnk,bnkv->bnv", gated.erased_k, state_BNKV, precision=dot_precision)
    added_BNV = added_BNV - read_BNV
  state_BNKV = state_BNKV + gated.k[..., None] * added_BNV[..., None, :]
  return jnp.einsum("bnk,bnkv->bnv", gated.q, state_BNKV, precision=dot_precision), state_BNKV
