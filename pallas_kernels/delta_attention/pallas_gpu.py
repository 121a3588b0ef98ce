"""Computes delta attention on Hopper: chunks by XLA, side by side, and the way between by a kernel.

What a chunk needs besides the state at its start (`chunk.make_operands`) is computed for all chunks
at once, and so are the gradients of that; a kernel (`gpu_scan`) goes from chunk to chunk with the
state in registers, forward and back. Operands of its products are bfloat16, sums and states
float32. Memory is linear in T.

Values are tested in the simulator of a GPU (shared memory, TMA, barriers, races; jax 0.11 and
later), and it lowers for Hopper on jax 0.10 to 0.12. No GPU has run it.
"""

# B batch, T positions, N heads, K width of keys, V width of values, M = B * N, J chunks,
# C positions of a chunk, E = M * J chunks of all heads
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.delta_attention.chunk import ChunkOperands, make_operands
from pallas_kernels.delta_attention.gpu_scan import (
  CHUNK,
  COLUMNS,
  Operands,
  scan_backward,
  scan_forward,
)
from pallas_kernels.delta_attention.terms import Gated, GateParameters, Options, Tokens
from pallas_kernels.delta_attention.xla import gate_tokens

AT_ONCE = 512
"""Chunks whose operands are computed together."""


def unsupported(tokens: Tokens, options: Options) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  if tokens.q.dtype != jnp.bfloat16:
    return f"q_BTHK.dtype={tokens.q.dtype}, the kernel multiplies bfloat16"
  return why_no_hopper(options.interpret)


class Sizes(NamedTuple):
  """Holds the sizes of the kernels' arrays, padded to whole tiles."""

  M: int
  J: int
  K: int
  V: int


def sizes_of(tokens: Tokens) -> Sizes:
  """Returns the padded sizes of a call."""
  B, T, N, V = tokens.v.shape
  K = round_up(tokens.q.shape[3], COLUMNS)
  return Sizes(B * N, -(-T // CHUNK), K, round_up(V, COLUMNS))


def forward(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array, options: Options, *, save: bool
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns the output [B, T, N, V], the final state and, to be saved, the chunks' first states."""
  sizes, (B, T, N, V) = sizes_of(tokens), tokens.v.shape
  gated_E = cut_chunks(gate_padded(tokens, gate, options), sizes)
  operands, decay_MJK = arrange(in_parts(make_operands, gated_E), sizes)
  first_MKV = pad_state(state_BNKV, sizes)
  o_MTV, last_MKV, states = scan_forward(
    operands, decay_MJK, first_MKV, options.interpret, save=save
  )
  o_BNTV = o_MTV[:, :T, :V].reshape(B, N, T, V)
  return o_BNTV.swapaxes(1, 2), state_like(last_MKV, state_BNKV), states


def backward(
  tokens: Tokens,
  gate: GateParameters,
  states_MJKV: jax.Array,
  do_BTNV: jax.Array,
  dstate_BNKV: jax.Array,
  options: Options,
) -> tuple[Tokens, GateParameters, jax.Array]:
  """Returns the gradients of tokens, gate and initial state, in their dtypes."""
  sizes, (T, V) = sizes_of(tokens), (tokens.v.shape[1], tokens.v.shape[3])
  reset = tokens.reset

  def gate_and_cut(tokens: Tokens, gate: GateParameters) -> Gated:
    return cut_chunks(gate_padded(tokens._replace(reset=reset), gate, options), sizes)

  gated_E, pull = jax.vjp(gate_and_cut, tokens._replace(reset=None), gate)
  operands, decay_MJK = arrange(in_parts(make_operands, gated_E), sizes)
  do_MTV = do_BTNV.astype(operands.q.dtype).swapaxes(1, 2).reshape(sizes.M, T, V)
  do_MTV = pad_axis(pad_axis(do_MTV, sizes.J * CHUNK, 1), sizes.V, 2)
  minus = None if operands.erased is None else -operands.erased
  dlast_MKV = pad_state(dstate_BNKV, sizes)
  dadded_MTV, dnext_MJKV, dfirst_MKV = scan_backward(
    operands._replace(values=do_MTV, erased=minus), decay_MJK, dlast_MKV, options.interpret
  )
  of_chunks = [
    x.reshape(sizes.M * sizes.J, -1, sizes.V) for x in (states_MJKV, dnext_MJKV, do_MTV, dadded_MTV)
  ]
  dtokens, dgate = pull(in_parts(pull_operands, (gated_E, *of_chunks)))
  return dtokens, dgate, state_like(dfirst_MKV, dstate_BNKV)


def pull_operands(given: tuple[Gated, jax.Array, jax.Array, jax.Array, jax.Array]) -> Gated:
  """Returns the gradients of a chunk's gated tokens.

  Given are also the state at its start, the gradient of the state at its end, that of its output
  and of what its tokens add, with padding.
  """
  gated, state_KV, dnext_KV, do_CV, dadded_CV = given
  made, pull = jax.vjp(make_operands, gated)
  K, V, dtype = made.q_CK.shape[1], made.added_CV.shape[1], made.q_CK.dtype
  state_KV, dnext_KV = state_KV[:K, :V], dnext_KV[:K, :V]
  do_CV, dadded_CV = do_CV[:, :V], dadded_CV[:, :V]
  dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
  added_CV, derased_CK = made.added_CV, None
  if made.erased_CK is not None:
    narrow_CK = made.erased_CK.astype(state_KV.dtype)
    added_CV = added_CV - dot("ck,kv->cv", narrow_CK, state_KV)
    derased_CK = -dot("cv,kv->ck", dadded_CV, state_KV)
  added_CV = added_CV.astype(state_KV.dtype)
  gradients = ChunkOperands(
    q_CK=dot("cv,kv->ck", do_CV, state_KV),
    k_CK=dot("cv,kv->ck", added_CV, dnext_KV),
    visible_CC=dot("cv,dv->cd", do_CV, added_CV),
    added_CV=dadded_CV.astype(dtype),
    erased_CK=derased_CK,
    decay_K=jnp.sum(state_KV.astype(dtype) * dnext_KV.astype(dtype), axis=1),
  )
  return pull(gradients)[0]


# ------------------------------------------------------------------------- arrays of the kernels


def gate_padded(tokens: Tokens, gate: GateParameters, options: Options) -> Gated:
  """Returns tokens after norm and gates, [M, T, K, V or 1], padded to whole chunks."""
  T = tokens.q.shape[1]
  tokens = jax.tree.map(lambda x: pad_axis(x, round_up(T, CHUNK), 1), tokens)
  return gate_tokens(tokens, gate, T, options)


def cut_chunks(gated: Gated, sizes: Sizes) -> Gated:
  """Returns the chunks of all heads, [E, C, K, V or 1]."""
  return jax.tree.map(lambda x: x.reshape(sizes.M * sizes.J, CHUNK, -1), gated)


def in_parts(function: Callable[[Any], Any], chunks: Any) -> Any:
  """Returns the function of each chunk; what it has in memory is that of AT_ONCE chunks."""
  return jax.lax.map(function, chunks, batch_size=AT_ONCE)


def arrange(made: ChunkOperands, sizes: Sizes) -> tuple[Operands, jax.Array]:
  """Returns the kernel's operands and the decays of the state [M, J, K], from those of chunks."""

  def whole(x_EC: jax.Array, width: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    x_EC = pad_axis(x_EC.astype(dtype), width, 2)
    return x_EC.reshape(sizes.M, sizes.J * CHUNK, width)

  operands = Operands(
    q=whole(made.q_CK, sizes.K),
    k=whole(made.k_CK, sizes.K),
    visible=whole(made.visible_CC, CHUNK),
    erased=None if made.erased_CK is None else whole(made.erased_CK, sizes.K),
    values=whole(made.added_CV, sizes.V, jnp.float32),
  )
  return operands, pad_axis(made.decay_K, sizes.K, 1).reshape(sizes.M, sizes.J, sizes.K)


def pad_state(state_BNKV: jax.Array, sizes: Sizes) -> jax.Array:
  """Returns the state [M, K, V], padded."""
  state_MKV = state_BNKV.reshape(sizes.M, *state_BNKV.shape[2:])
  return pad_axis(pad_axis(state_MKV, sizes.K, 1), sizes.V, 2)


def state_like(state_MKV: jax.Array, like_BNKV: jax.Array) -> jax.Array:
  """Returns the state without padding, [B, N, K, V]."""
  K, V = like_BNKV.shape[2:]
  return state_MKV[:, :K, :V].reshape(like_BNKV.shape)
