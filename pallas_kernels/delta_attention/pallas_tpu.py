"""Computes delta attention on TPU (Pallas Mosaic): norms, gates, chunks and states in one kernel.

The grid goes over rows, groups of heads and, in order, chunks; the states of a group stay in VMEM.
Heads lie side by side along the lanes, as a projection writes them. A step computes its heads one
after another in one basic block, so that the compiler overlaps the chain of small products of one
with those of the others. The backward pass goes over the chunks in reverse and computes each
again from its inputs and the state at its start.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# B batch, T positions, N heads, K width of keys, V width of values, C positions of a chunk,
# J chunks, A heads of a step; X is K, V or 1; arrays with "heads" have heads and width on one axis
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.delta_attention import tiles
from pallas_kernels.delta_attention.terms import (
  WIPE,
  Gated,
  GateParameters,
  Options,
  Tokens,
  apply_gates,
  log_decay,
)

CHUNK = 64
LANES = 128
HEADS = 8
"""Heads of a step, at most."""
TOGETHER = 2
"""Heads whose decays are summed in one product."""
VMEM_BYTES = 48 * 2**20
"""What every chip has for blocks, states and values that do not fit into registers."""


def unsupported(tokens: Tokens, options: Options) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  dtype = tokens.q.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"q_BTHK.dtype={dtype}, the MXU multiplies float32 and bfloat16"
  if (reason := why_no_tpu(options.interpret)) is not None:
    return reason
  return None


class Parts(NamedTuple):
  """Holds what the kernels read and differentiate: blocks of a step, or tiles of a head."""

  q: Any  # [C, K]
  k: Any
  v: Any  # [C, V]
  decay: Any | None  # [C, K or 1]
  erase: Any | None  # [C, K or 1]
  write: Any | None  # [C, V or 1]
  rate: Any | None  # [1, K], exp(a_log) of the decay's gate
  bias: Any | None  # [1, K]


class Constants(NamedTuple):
  """Holds what kernels read besides."""

  reset: Any | None  # [C, 1] float32, 1 where a segment starts
  tables: tiles.Tables


@dataclasses.dataclass(frozen=True)
class Plan:
  """Says how a call is cut into blocks; sizes are padded to whole lanes and chunks."""

  B: int
  T: int
  N: int
  K: int
  V: int
  C: int
  A: int
  length: int  # positions without padding

  @property
  def J(self) -> int:
    """Returns the number of chunks."""
    return self.T // self.C


def compiler_params() -> pltpu.CompilerParams:
  """Returns both kernels' parameters: rows and groups of heads on all cores, chunks in order."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
  )


def make_plan(tokens: Tokens) -> Plan:
  """Returns the plan of a call."""
  B, T, N, V = tokens.v.shape
  C = max(16, min(CHUNK, 1 << (T - 1).bit_length()))
  A = next(heads for heads in range(HEADS, 0, -1) if N % heads == 0)
  K = round_up(tokens.q.shape[-1], LANES)
  return Plan(B, round_up(T, C), N, K, round_up(V, LANES), C, A, T)


# ------------------------------------------------------------------------- arrays of the kernels


def arrange(tokens: Tokens, gate: GateParameters, plan: Plan) -> tuple[Parts, Constants]:
  """Returns the kernels' arrays: heads along the lanes, padded; gates of heads in groups of A."""
  group = plan.N // tokens.q.shape[2]
  q, k = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (tokens.q, tokens.k))

  def parameter(x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    x_NK = pad_axis(jnp.broadcast_to(x, (plan.N, tokens.q.shape[3])), plan.K, 1)
    return x_NK.astype(jnp.float32).reshape(1, -1)

  rate = None if gate.a_log_N is None else jnp.exp(gate.a_log_N.astype(jnp.float32))[:, None]
  parts = Parts(
    q=_flatten(q, plan.K, plan),
    k=_flatten(k, plan.K, plan),
    v=_flatten(tokens.v, plan.V, plan),
    decay=_flatten(tokens.decay, plan.K, plan),
    erase=_flatten(tokens.erase, plan.K, plan),
    write=_flatten(tokens.write, plan.V, plan),
    rate=parameter(rate),
    bias=parameter(gate.bias_NX),
  )
  reset = None
  if tokens.reset is not None:
    reset = pad_axis(tokens.reset.astype(jnp.float32)[..., None], plan.T, 1)
  dtype = jnp.float32 if tokens.q.dtype == jnp.float32 else jnp.bfloat16
  return parts, Constants(reset, tiles.make_tables(plan.C, dtype))


def _flatten(x: jax.Array | None, width: int, plan: Plan) -> jax.Array | None:
  """Returns [B, T, N * width], or [B, N / A, T, A] of one number for a head."""
  if x is None:
    return None
  x = pad_axis(x, plan.T, 1)
  if x.shape[3] == 1:
    x = x.reshape(plan.B, plan.T, plan.N // plan.A, plan.A).swapaxes(1, 2)
    return x.astype(jnp.float32)
  return pad_axis(x, width, 3).reshape(plan.B, plan.T, plan.N * width)


def _unflatten(x: jax.Array, like: jax.Array, plan: Plan) -> jax.Array:
  """Returns the array [B, T, heads, X] that `_flatten` has padded, in its dtype and shape."""
  if x.ndim == 4:
    x = x.swapaxes(1, 2).reshape(plan.B, plan.T, plan.N, 1)
  else:
    x = x.reshape(plan.B, plan.T, plan.N, -1)
  B, T, heads, X = like.shape
  x = x[:, :T, :, :X]
  if heads < plan.N:
    x = jnp.sum(x.astype(jnp.float32).reshape(B, T, heads, -1, X), axis=3)
  return x.astype(like.dtype)


def part_blocks(parts: Parts, plan: Plan, chunk: Callable[[Any], Any]) -> Parts:
  """Returns the block of each array for the step's heads; `chunk` tells it from the grid's."""

  def block(x: jax.Array | None) -> pl.BlockSpec | None:
    if x is None:
      return None
    if x.ndim == 4:
      return pl.BlockSpec((1, 1, plan.C, plan.A), lambda b, n, j: (b, n, chunk(j), 0))
    width = x.shape[-1] // plan.N * plan.A
    if x.ndim == 2:
      return pl.BlockSpec((1, width), lambda b, n, j: (0, n))
    return pl.BlockSpec((1, plan.C, width), lambda b, n, j: (b, chunk(j), n))

  return Parts(*(block(x) for x in parts))


def constant_blocks(constants: Constants, plan: Plan, chunk: Callable[[Any], Any]) -> Constants:
  """Returns the blocks of the constants."""

  def whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda b, n, j: (0,) * x.ndim)

  reset = pl.BlockSpec((1, plan.C, 1), lambda b, n, j: (b, chunk(j), 0))
  tables = jax.tree.map(whole, constants.tables)
  return Constants(None if constants.reset is None else reset, tables)


# --------------------------------------------------------------------------------------- kernels


def forward(
  tokens: Tokens, gate: GateParameters, state_BNKV: jax.Array, options: Options, *, save: bool
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns the output [B, T, N, V], the final state and, to be saved, the chunks' first states."""
  plan = make_plan(tokens)
  parts, constants = arrange(tokens, gate, plan)
  B, J, N, V, K, A = plan.B, plan.J, plan.N, plan.V, plan.K, plan.A

  def chunk(j: Any) -> Any:
    return j

  state_block = pl.BlockSpec((1, A, V, K), lambda b, n, j: (b, n, 0, 0))
  starts_block = pl.BlockSpec((1, 1, A, V, K), lambda b, n, j: (b, j, n, 0, 0))
  blocks = part_blocks(parts, plan, chunk)
  like = tokens.v
  o, last_BNVK, starts = pl.pallas_call(
    functools.partial(forward_kernel, plan=plan, options=options),
    grid=(B, N // A, J),
    in_specs=(blocks, constant_blocks(constants, plan, chunk), state_block),
    out_specs=(blocks.v, state_block, starts_block if save else None),
    out_shape=(
      varying_struct(parts.v.shape, tokens.v.dtype, like),
      varying_struct((B, N, V, K), jnp.float32, like),
      varying_struct((B, J, N, V, K), tokens.v.dtype, like) if save else None,
    ),
    scratch_shapes=(pltpu.VMEM((A, V, K), jnp.float32),),
    compiler_params=compiler_params(),
    interpret=options.interpret,
    name="delta_attention_forward",
  )(parts, constants, _pad_state(state_BNKV, plan))
  return _unflatten(o, tokens.v, plan), _state_like(last_BNVK, state_BNKV), starts


def forward_kernel(
  parts: Parts,
  constants: Constants,
  first_AVK: Any,
  o: Any,
  last_AVK: Any,
  start_AVK: Any | None,
  state_AVK: Any,
  *,
  plan: Plan,
  options: Options,
) -> None:
  """Computes a chunk of A heads."""
  j = pl.program_id(2)

  @pl.when(j == 0)
  def start() -> None:
    state_AVK[...] = first_AVK[0]

  if start_AVK is not None:
    start_AVK[0, 0] = state_AVK[...].astype(start_AVK.dtype)
  tables, wipe_C1, exists_C1 = read_constants(constants, j, plan)
  heads = range(plan.A)
  gated = [gate_tile(read_head(parts, head, plan), wipe_C1, exists_C1, options) for head in heads]
  starts = [tiles.Head(x, state_AVK[head]) for head, x in enumerate(gated)]
  outputs = tiles.attend_to_chunks(starts, tables, TOGETHER)
  for head, (o_CV, state_VK) in enumerate(zip(*outputs)):
    o[0, :, head * plan.V : (head + 1) * plan.V] = o_CV.astype(o.dtype)
    state_AVK[head] = state_VK

  @pl.when(j == plan.J - 1)
  def finish() -> None:
    last_AVK[0] = state_AVK[...]


def backward(
  tokens: Tokens,
  gate: GateParameters,
  starts: jax.Array,
  do_BTNV: jax.Array,
  dstate_BNKV: jax.Array,
  options: Options,
) -> tuple[Tokens, GateParameters, jax.Array]:
  """Returns the gradients of tokens, gate and initial state, in their dtypes."""
  plan = make_plan(tokens)
  parts, constants = arrange(tokens, gate, plan)
  B, J, N, V, K, A = plan.B, plan.J, plan.N, plan.V, plan.K, plan.A

  def chunk(j: Any) -> Any:
    return J - 1 - j

  state_block = pl.BlockSpec((1, A, V, K), lambda b, n, j: (b, n, 0, 0))
  starts_block = pl.BlockSpec((1, 1, A, V, K), lambda b, n, j: (b, chunk(j), n, 0, 0))
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
      starts_block,
      blocks.v,
      state_block,
    ),
    out_specs=(out_blocks, state_block),
    out_shape=(out_shape, varying_struct((B, N, V, K), jnp.float32, like)),
    scratch_shapes=(pltpu.VMEM((A, V, K), jnp.float32),),
    compiler_params=compiler_params(),
    interpret=options.interpret,
    name="delta_attention_backward",
  )(parts, constants, starts, _flatten(do_BTNV, V, plan), _pad_state(dstate_BNKV, plan))
  gradients: list[Any] = [
    None if x is None else _unflatten(dx, x, plan) for dx, x in zip(dparts[:6], tokens[:6])
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
  return dtokens, dgate, _state_like(dfirst_BNVK, dstate_BNKV)


def backward_kernel(
  parts: Parts,
  constants: Constants,
  start_AVK: Any,
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

  def attend(tiles_of_heads: list[Parts], states: list[jax.Array]):
    gated = [gate_tile(tile, wipe_C1, exists_C1, options) for tile in tiles_of_heads]
    starts = [tiles.Head(*start) for start in zip(gated, states)]
    return tiles.attend_to_chunks(starts, tables, TOGETHER)

  heads = range(plan.A)
  states = [start_AVK[0, 0, head].astype(jnp.float32) for head in heads]
  _, pull = jax.vjp(attend, [read_head(parts, head, plan) for head in heads], states)
  do_heads = [do[0, :, head * plan.V : (head + 1) * plan.V].astype(jnp.float32) for head in heads]
  gradients = pull((do_heads, [dstate_AVK[head] for head in heads]))
  for head, (dtile, dstate_VK) in enumerate(zip(*gradients)):
    write_head(dparts, dtile, head, plan)
    dstate_AVK[head] = dstate_VK

  @pl.when(j == plan.J - 1)
  def finish() -> None:
    dfirst_AVK[0] = dstate_AVK[...]


# -------------------------------------------------------------------------------- parts of both


def read_constants(constants: Constants, chunk: Any, plan: Plan):
  """Returns tables, the log decay that clears where segments start, and which positions exist."""
  sums, transposed, level_CC, level_8C = constants.tables
  tables = tiles.Tables(
    [sums[i] for i in range(sums.shape[0])],
    [transposed[i] for i in range(sums.shape[0])],
    level_CC[...],
    level_8C[...],
  )
  wipe_C1 = None if constants.reset is None else WIPE * constants.reset[0]
  exists_C1 = None
  if plan.length % plan.C:
    at_C1 = jax.lax.broadcasted_iota(jnp.int32, (plan.C, 1), 0)
    exists_C1 = chunk * plan.C + at_C1 < plan.length
  return tables, wipe_C1, exists_C1


def read_head(parts: Parts, head: int, plan: Plan) -> Parts:
  """Returns the tiles of one head of a step, float32."""

  def read(ref: Any) -> Any:
    return None if ref is None else ref[_index(ref, head, plan)].astype(jnp.float32)

  return Parts(*(read(ref) for ref in parts))


def write_head(dparts: Parts, dtile: Parts, head: int, plan: Plan) -> None:
  """Writes the gradients of one head's tiles; adds those of the gate's parameters."""
  for ref, value in zip(dparts[:6], dtile[:6]):
    if ref is not None:
      ref[_index(ref, head, plan)] = value.astype(ref.dtype)
  for ref, value in zip(dparts[6:], dtile[6:]):
    if ref is not None:
      at = (0, slice(None), slice(head * plan.K, (head + 1) * plan.K))
      ref[at] = ref[at] + value


def _index(ref: Any, head: int, plan: Plan) -> tuple[Any, ...]:
  """Returns where a head's tile is in a block of a step."""
  if len(ref.shape) == 4:
    return 0, 0, slice(None), slice(head, head + 1)
  width = ref.shape[-1] // plan.A
  lanes = slice(head * width, (head + 1) * width)
  return (slice(None), lanes) if len(ref.shape) == 2 else (0, slice(None), lanes)


def gate_tile(tile: Parts, wipe_C1: Any, exists_C1: Any, options: Options) -> Gated:
  """Returns one head's tokens after norm and gates, and resets and padding in their decay."""
  tokens = Tokens(tile.q, tile.k, tile.v, None, tile.erase, tile.write, None)
  gated = apply_gates(tokens, GateParameters(None, None), options)
  if tile.decay is None and wipe_C1 is None:
    return gated
  decay_CK = jnp.zeros_like(gated.k)
  if tile.decay is not None:
    x_CK = jnp.broadcast_to(tile.decay, gated.k.shape)
    decay_CK = log_decay(x_CK, tile.rate, tile.bias, options)
  if exists_C1 is not None:
    decay_CK = jnp.where(exists_C1, decay_CK, 0.0)
  return gated._replace(decay=decay_CK if wipe_C1 is None else decay_CK + wipe_C1)


def _pad_state(state_BNKV: jax.Array, plan: Plan) -> jax.Array:
  """Returns the state transposed, [B, N, V, K], padded to whole lanes."""
  state_BNVK = state_BNKV.astype(jnp.float32).swapaxes(2, 3)
  return pad_axis(pad_axis(state_BNVK, plan.V, 2), plan.K, 3)


def _state_like(state_BNVK: jax.Array, like: jax.Array) -> jax.Array:
  """Returns the state without padding, [B, N, K, V]."""
  K, V = like.shape[2:]
  return state_BNVK[:, :, :V, :K].swapaxes(2, 3)
