"""Gives every chunked implementation its gradient; NaN and infinities stay where they belong."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V width of
# values
from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.confine import (
  clean,
  put_nan,
  reached_backward,
  reached_BTN,
)
from pallas_kernels.delta_attention.terms import GateParameters, Options, Tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
  tokens: Tokens,
  gate: GateParameters,
  state_BNKV: jax.Array,
  module: ModuleType,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, V] and the final state by the module's `forward`.

  Has reverse-mode gradients, by the module's `backward`.
  """
  return _forward(tokens, gate, state_BNKV, module, options, save=False)[0]


def _forward(tokens, gate, state_BNKV, module: ModuleType, options: Options, *, save: bool = True):
  inputs, bad = clean(tokens, gate, state_BNKV)
  o_BTNV, last_BNKV, saved = module.forward(*inputs, options, save=save)
  reached = reached_BTN(bad, tokens.reset)
  outputs = put_nan(o_BTNV, reached | bad.q_BTN), put_nan(last_BNKV, reached[:, -1])
  return outputs, (tokens, gate, state_BNKV, saved)


def _backward(module: ModuleType, options: Options, residuals, cotangents):
  tokens, gate, state_BNKV, saved = residuals
  (clean_tokens, clean_gate, _), bad = clean(tokens, gate, state_BNKV)
  do_BTNV, dlast_BNKV = cotangents
  bad_do_BTN = jnp.any(~jnp.isfinite(do_BTNV), axis=-1)
  bad_last_BN = jnp.any(~jnp.isfinite(dlast_BNKV), axis=(2, 3))
  do_BTNV = jnp.where(bad_do_BTN[..., None], 0, do_BTNV)
  dlast_BNKV = jnp.where(bad_last_BN[..., None, None], 0, dlast_BNKV)
  dtokens, dgate, dstate_BNKV = module.backward(
    clean_tokens, clean_gate, saved, do_BTNV, dlast_BNKV, options
  )
  after = reached_BTN(bad, tokens.reset)
  source_BTN = bad_do_BTN | bad.q_BTN | bad.k_BTN
  before, first_BN = reached_backward(source_BTN, bad_last_BN, tokens.reset)
  here = before | after
  dtokens = Tokens(
    q=put_nan(dtokens.q, after | bad_do_BTN | bad.q_BTN),
    k=put_nan(dtokens.k, here),
    v=put_nan(dtokens.v, here),
    decay=put_nan(dtokens.decay, here),
    erase=put_nan(dtokens.erase, here),
    write=put_nan(dtokens.write, here),
    reset=None,
  )
  dgate = GateParameters(*(put_nan(x, jnp.any(here, axis=(0, 1))) for x in dgate))
  return dtokens, dgate, put_nan(dstate_BNKV, first_BN)


attend.defvjp(_forward, _backward)
