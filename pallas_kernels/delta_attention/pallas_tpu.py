"""Computes delta attention on TPU (Pallas Mosaic): norms, gates, chunks and states in one kernel.

The grid goes over rows, groups of heads and, in order, chunks; the states of a group stay in VMEM.
A chain of small products is all latency, so that independent work stands beside it in the program.
Forward, a step prepares what a chunk needs besides the state, and finishes the chunk before it,
whose triangular inverse is the longest chain. The backward pass goes over the chunks in reverse; it
reads the states at their starts and their products of pairs, which the forward pass has saved, and
a head does what waits for products while others do what does not.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# B batch, T positions, N heads, K width of keys, V width of values, C positions of a chunk,
# J chunks, A heads of a step, R kinds of rows
from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.delta_attention import tiles
from pallas_kernels.delta_attention.terms import GateParameters, Options, Tokens
from pallas_kernels.delta_attention.tile_layout import (
  Constants,
  Parts,
  Plan,
  arrange,
  constant_blocks,
  flatten,
  gate_tile,
  make_plan,
  pad_state,
  part_blocks,
  read_constants,
  read_head,
  state_like,
  unflatten,
  write_head,
)
from pallas_kernels.delta_attention.tile_products import Steps, in_turn, run, slowed

FORWARD_HEADS = 16
BACKWARD_HEADS = 32
"""Heads of a step, at most: few leave products to be waited for at its begin and end. In float32
half as many go backward, for want of memory."""
FORWARD_DELAY = 2.5
BACKWARD_DELAY = 1
"""Rounds from a head's start to the next head's: few hide products better and spill more."""
VMEM_BYTES = 48 * 2**20
"""What every chip has for blocks, states and values that do not fit into registers."""


def unsupported(tokens: Tokens, options: Options) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  dtype = tokens.q.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"q_BTHK.dtype={dtype}, the MXU multiplies float32 and bfloat16"
  return why_no_tpu(options.interpret)


class Saved(NamedTuple):
  """Holds what the backward pass reads, for each chunk of each head."""

  starts: Any  # [B, J, N, V, K], the states at the chunks' starts
  pairs: Any  # [B, J, N, C, R C]: visible pairs and, where there is erasing, the inverse


def compiler_params() -> pltpu.CompilerParams:
  """Returns both kernels' parameters: rows and groups of heads on all cores, chunks in order.

  Blocks divide the padded arrays, so no copy leaves one, and the simulator raises where one did;
  compiled checks of the copies take 290 of the 7,250 cycles of v5p's forward step.
  """
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    vmem_limit_bytes=VMEM_BYTES,
    disable_bounds_checks=True,
  )


def saved_blocks(saved: Saved, plan: Plan, chunk: Any) -> Saved:
  """Returns the blocks of what is saved, for the step's heads and chunk."""
  return Saved(
    *(
      pl.BlockSpec((1, 1, plan.A, *x.shape[3:]), lambda b, n, j: (b, chunk(j), n, 0, 0))
      for x in saved
    )
  )


def forward(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array, options: Options, *, save: bool
) -> tuple[jax.Array, jax.Array, Saved | None]:
  """Returns the output [B, T, N, V], the final state and, to be saved, what the backward reads."""
  plan = make_plan(tokens, FORWARD_HEADS)
  options = dataclasses.replace(options, coarse=tokens.q.dtype == jnp.bfloat16)
  parts, constants = arrange(tokens, gate, plan)
  B, J, N, V, K, C, A = plan.B, plan.J, plan.N, plan.V, plan.K, plan.C, plan.A
  dtype, f32 = constants.tables.dtype, jnp.float32

  def prepared(j: Any) -> Any:
    return jnp.minimum(j, J - 1)

  def finished(j: Any) -> Any:
    return jnp.maximum(j - 1, 0)

  state_block = pl.BlockSpec((1, A, V, K), lambda b, n, j: (b, n, 0, 0))
  kinds = 1 if tokens.erase is None else 2
  saved = Saved(
    varying_struct((B, J, N, V, K), tokens.v.dtype, tokens.v),
    varying_struct((B, J, N, C, kinds * C), dtype, tokens.v),
  )
  has_decay = tokens.decay is not None or tokens.reset is not None
  scratch = tiles.Prepared(
    rows=pltpu.VMEM((2, A, kinds * C, K), dtype),
    k=pltpu.VMEM((2, A, C, K), dtype),
    v=pltpu.VMEM((2, A, C, V), f32),
    visible=pltpu.VMEM((2, A, C, C), dtype),
    lower=pltpu.VMEM((2, A, C, C), f32) if kinds == 2 else None,
    total=pltpu.VMEM((2, A, 1, K), f32) if has_decay else None,
  )
  o, last_BNVK, saved = pl.pallas_call(
    functools.partial(forward_kernel, plan=plan, options=options),
    grid=(B, N // A, J + 1),
    in_specs=(
      part_blocks(parts, plan, prepared),
      constant_blocks(constants, plan, prepared),
      state_block,
    ),
    out_specs=(
      part_blocks(parts, plan, finished).v,
      state_block,
      saved_blocks(saved, plan, finished) if save else None,
    ),
    out_shape=(
      varying_struct(parts.v.shape, tokens.v.dtype, tokens.v),
      varying_struct((B, N, V, K), f32, tokens.v),
      saved if save else None,
    ),
    scratch_shapes=(pltpu.VMEM((A, V, K), f32), scratch),
    compiler_params=compiler_params(),
    interpret=options.interpret,
    name=f"delta_attention_forward_{A}_heads",
  )(parts, constants, pad_state(state_BNKV, plan))
  return unflatten(o, tokens.v, plan), state_like(last_BNVK, state_BNKV), saved


def forward_kernel(
  parts: Parts,
  constants: Constants,
  first_AVK: Any,
  o: Any,
  last_AVK: Any,
  saved: Saved | None,
  state_AVK: Any,
  scratch: tiles.Prepared,
  *,
  plan: Plan,
  options: Options,
) -> None:
  """Prepares a chunk of A heads and finishes the one before it; at first there is none."""
  j = pl.program_id(2)
  here = jax.lax.rem(j, 2)

  @pl.when(j == 0)
  def start() -> None:
    state_AVK[...] = first_AVK[0]
    for ref in jax.tree.leaves(scratch):  # a chunk that keeps the state
      ref[1] = jnp.zeros(ref.shape[1:], ref.dtype)

  chunk = jnp.minimum(j, plan.J - 1)
  tables, wipe_C1, exists_C1 = read_constants(constants, chunk, plan)

  def prepare(head: int) -> Steps:
    gated = gate_tile(read_head(parts, head, plan), wipe_C1, exists_C1, options)
    prepared = yield from tiles.prepare(gated, tables)
    for ref, x in zip(scratch, prepared):
      if ref is not None:
        ref[here, head] = x

  def finish() -> Steps:
    heads = [
      tiles.Prepared(*(None if ref is None else ref.at[1 - here, head] for ref in scratch))
      for head in range(plan.A)
    ]
    states = [state_AVK.at[head] for head in range(plan.A)]
    solved = yield from tiles.solve(heads, states, tables)
    for i, (head, state_VK, (read_CV, added_CV, inverse_CC)) in enumerate(
      zip(heads, states, solved)
    ):
      if saved is not None:
        saved.starts[0, 0, i] = state_VK[...].astype(saved.starts.dtype)
        saved.pairs[0, 0, i, :, : plan.C] = head.visible[...]
        if inverse_CC is not None:
          saved.pairs[0, 0, i, :, plan.C :] = inverse_CC.astype(saved.pairs.dtype)
      o_CV, state_VK[...] = tiles.attend(head, state_VK[...], read_CV, added_CV, tables)
      o[0, :, i * plan.V : (i + 1) * plan.V] = o_CV.astype(o.dtype)
      yield

  preparing = in_turn([prepare(head) for head in range(plan.A)], FORWARD_DELAY)
  run(in_turn([slowed(finish(), 1), preparing]))

  @pl.when(j == plan.J)
  def end() -> None:
    last_AVK[0] = state_AVK[...]


def backward(
  tokens: Tokens,
  gate: GateParameters,
  saved: Saved,
  do_BTNV: jax.Array,
  dstate_BNKV: jax.Array,
  options: Options,
) -> tuple[Tokens, GateParameters, jax.Array]:
  """Returns the gradients of tokens, gate and initial state, in their dtypes."""
  most = BACKWARD_HEADS if tokens.q.dtype == jnp.bfloat16 else BACKWARD_HEADS // 2
  plan = make_plan(tokens, most)
  options = dataclasses.replace(options, coarse=tokens.q.dtype == jnp.bfloat16)
  parts, constants = arrange(tokens, gate, plan)
  B, J, N, V, K, A = plan.B, plan.J, plan.N, plan.V, plan.K, plan.A

  def chunk(j: Any) -> Any:
    return J - 1 - j

  state_block = pl.BlockSpec((1, A, V, K), lambda b, n, j: (b, n, 0, 0))
  blocks = part_blocks(parts, plan, chunk)
  sum_block = pl.BlockSpec((1, 1, A * K), lambda b, n, j: (b, 0, n))
  out_blocks = blocks._replace(
    rate=None if parts.rate is None else sum_block, bias=None if parts.bias is None else sum_block
  )
  like = tokens.v
  out_shape = jax.tree.map(lambda x: varying_struct(x.shape, x.dtype, like), parts)
  sums = varying_struct((B, 1, N * K), jnp.float32, like)
  out_shape = out_shape._replace(
    rate=None if parts.rate is None else sums, bias=None if parts.bias is None else sums
  )
  dparts, dfirst_BNVK = pl.pallas_call(
    functools.partial(backward_kernel, plan=plan, options=options),
    grid=(B, N // A, J),
    in_specs=(
      blocks,
      constant_blocks(constants, plan, chunk),
      saved_blocks(saved, plan, chunk),
      blocks.v,
      state_block,
    ),
    out_specs=(out_blocks, state_block),
    out_shape=(out_shape, varying_struct((B, N, V, K), jnp.float32, like)),
    scratch_shapes=(pltpu.VMEM((A, V, K), jnp.float32),),
    compiler_params=compiler_params(),
    interpret=options.interpret,
    name=f"delta_attention_backward_{A}_heads",
  )(parts, constants, saved, flatten(do_BTNV, V, plan), pad_state(dstate_BNKV, plan))
  gradients: list[Any] = [
    None if x is None else unflatten(dx, x, plan) for dx, x in zip(dparts[:6], tokens[:6])
  ]
  dtokens = Tokens(*gradients, reset=None)  # type: ignore[misc]
  dgate = GateParameters(None, None)
  if gate.a_log_N is not None:
    drate_N = jnp.sum(dparts.rate.reshape(B, N, K), axis=(0, 2))
    dgate = dgate._replace(a_log_N=drate_N * jnp.exp(gate.a_log_N))
  if gate.bias_NX is not None:
    dbias_NK = jnp.sum(dparts.bias.reshape(B, N, K), axis=0)
    if gate.bias_NX.shape[1] == 1:
      dbias_NK = jnp.sum(dbias_NK, axis=1, keepdims=True)
    dbias_NX = dbias_NK[:, : gate.bias_NX.shape[1]]
    dgate = dgate._replace(bias_NX=dbias_NX.astype(gate.bias_NX.dtype))
  return dtokens, dgate, state_like(dfirst_BNVK, dstate_BNKV)


def backward_kernel(
  parts: Parts,
  constants: Constants,
  saved: Saved,
  do: Any,
  dlast_AVK: Any,
  dparts: Parts,
  dfirst_AVK: Any,
  dstate_AVK: Any,
  *,
  plan: Plan,
  options: Options,
) -> None:
  """Computes the gradients of a chunk of A heads, from those of its output and last state."""
  j = pl.program_id(2)
  sums = [ref for ref in (dparts.rate, dparts.bias) if ref is not None]

  @pl.when(j == 0)
  def start() -> None:
    dstate_AVK[...] = dlast_AVK[0]
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  tables, wipe_C1, exists_C1 = read_constants(constants, plan.J - 1 - j, plan)

  def pull(head: int) -> Steps:
    def attend(tile: Parts):
      return gate_tile(tile, wipe_C1, exists_C1, options)

    gated, pull_gates = jax.vjp(attend, read_head(parts, head, plan))
    here = tiles.Saved(
      saved.starts[0, 0, head],
      saved.pairs[0, 0, head, :, : plan.C],
      None if parts.erase is None else saved.pairs[0, 0, head, :, plan.C :],
    )
    do_CV = do[0, :, head * plan.V : (head + 1) * plan.V].astype(jnp.float32)
    dgated, dstate_AVK[head] = yield from tiles.pull(gated, here, do_CV, dstate_AVK[head], tables)
    (dtile,) = pull_gates(dgated)
    write_head(dparts, dtile, head, plan)

  run(in_turn([pull(head) for head in range(plan.A)], BACKWARD_DELAY))

  @pl.when(j == plan.J - 1)
  def finish() -> None:
    dfirst_AVK[0] = dstate_AVK[...]
