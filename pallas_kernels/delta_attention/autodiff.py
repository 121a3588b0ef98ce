"""Gives every chunked implementation its gradient; NaN and infinities stay where they belong.

The TPU kernels run on the inputs as they are. What is bad in them shows in the output or the final
state; only then they run again, a head at a time on clean inputs. The others always have clean
inputs, which XLA fuses with what it does before them.
"""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V width of
# values
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention.confine import (
  all_finite,
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
  inputs = tokens, gate, state_BNKV
  confined = functools.partial(_confined_forward, module=module, options=options, save=save)
  if module.__name__ != f"{__package__}.pallas_tpu":
    fine, results = None, confined(inputs)
  else:
    results = module.forward(*inputs, options, save=save)
    fine = all_finite(results[:2])
    axes = 2, 1, jax.tree.map(lambda x: 2, results[2])
    results = _head_by_head(fine, confined, inputs, _head_axes(inputs), results, axes)
  o_BTNV, last_BNKV, saved = results
  return (o_BTNV, last_BNKV), (inputs, saved, fine)


def _backward(module: ModuleType, options: Options, residuals, cotangents):
  inputs, saved, fine = residuals
  confined = functools.partial(_confined_backward, module=module, options=options)
  everything = inputs, saved, cotangents
  if fine is None:
    return confined(everything)
  gradients = module.backward(*inputs[:2], saved, *cotangents, options)
  axes = _head_axes(inputs), jax.tree.map(lambda x: 2, saved), (2, 1)
  fine = fine & all_finite(cotangents)
  return _head_by_head(fine, confined, everything, axes, gradients, _head_axes(gradients))


def _head_axes(inputs: tuple[Tokens, GateParameters, jax.Array]) -> Any:
  """Returns which axis of tokens, gate and state, or of gradients, is that of heads; -1: none."""
  tokens, gate, _ = inputs
  axes = jax.tree.map(lambda x: 2, tokens)
  if tokens.reset is not None:
    axes = axes._replace(reset=-1)
  return axes, jax.tree.map(lambda x: 0, gate), 1


def _head_by_head(
  fine: jax.Array,
  confined: Callable[[Any], Any],
  inputs: Any,
  input_axes: Any,
  results: Any,
  result_axes: Any,
) -> Any:
  """Returns the results where all is fine, else those of `confined` for every head of keys.

  The axes say where an array's heads are. They are side by side with the width in the loop, as the
  kernels read them; XLA would copy them to another layout before it.
  """
  H = inputs[0].q.shape[2] if isinstance(inputs[0], Tokens) else inputs[0][0].q.shape[2]

  def flat(x: jax.Array, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1) if x.ndim == 4 and axis == 2 else x

  def take(x: jax.Array, axis: int, like: jax.Array, h: jax.Array) -> jax.Array:
    if axis < 0:
      return x
    shape = tuple(n // H if i == axis else n for i, n in enumerate(like.shape))
    size = x.shape[axis] // H
    return jax.lax.dynamic_slice_in_dim(x, h * size, size, axis).reshape(shape)

  def put(x: jax.Array, axis: int, update: jax.Array, h: jax.Array) -> jax.Array:
    update = flat(update, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, update, h * update.shape[axis], axis)

  def body(h: jax.Array, carry: Any) -> Any:
    here = jax.tree.map(functools.partial(take, h=h), flat_inputs, input_axes, inputs)
    return jax.tree.map(functools.partial(put, h=h), carry, result_axes, confined(here))

  flat_inputs = jax.tree.map(flat, inputs, input_axes)
  flat_results = jax.tree.map(flat, results, result_axes)
  computed = jax.lax.fori_loop(0, jnp.where(fine, 0, H), body, flat_results)
  return jax.tree.map(lambda x, like: x.reshape(like.shape), computed, results)


def _confined_forward(inputs, *, module: ModuleType, options: Options, save: bool):
  """Returns output, final state and what is saved, from clean inputs; NaN where it belongs."""
  cleaned, bad = clean(*inputs)
  o_BTNV, last_BNKV, saved = module.forward(*cleaned, options, save=save)
  reached = reached_BTN(bad, inputs[0].reset)
  return put_nan(o_BTNV, reached | bad.q_BTN), put_nan(last_BNKV, reached[:, -1]), saved


def _confined_backward(everything, *, module: ModuleType, options: Options):
  """Returns gradients from clean inputs and cotangents, with NaN where it belongs."""
  (tokens, gate, state_BNKV), saved, (do_BTNV, dlast_BNKV) = everything
  (clean_tokens, clean_gate, _), bad = clean(tokens, gate, state_BNKV)
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
