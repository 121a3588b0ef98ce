"""Attends to selected blocks on TPU (Pallas Mosaic), by blocks of queries and their unions.

The keys and values of one key head stay in VMEM. A query block of Q positions and its G heads are
the R = Q * G columns of every product; blocks of its union are read by their place and stacked to
a tile of keys. Tiles are transposed, [keys, R], so that what belongs to a query lies along the
lanes. A query that did not select a block subtracts infinity there in place of its maximum: the
mask costs nothing per entry, and only blocks that reach past the first query compare positions.

Backward: one kernel makes the gradient of the queries by the same unions; another goes through the
query blocks of each block of keys, whose queries it copies from HBM two at a time, ahead of their
use. Each gradient has one writer and sums have a fixed order.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# B batch, T query positions, S key positions, K key heads, H width of queries and keys,
# U width of values, A = B * K, G heads of a group, Q queries and R = Q * G rows of a query block,
# X query blocks, J blocks of keys, L keys that are read of a block, Y keys of a tile
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import nonfinite, pairs, unions
from pallas_kernels.sparse_attention.places import Options, Places

LANES = 128
ALIGN = 16  # rows of bfloat16 in a register: where a block of a packed row may be read from
TILE_KEYS = 256
PART = 256  # rows whose softmax is one piece of work
COPIED = 2  # query blocks that the keys' kernel works on at a time
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
  """Holds the sizes of the kernels; hashable."""

  S: int
  G: int
  Q: int
  block: int
  packed: bool  # blocks start anywhere
  scale: float
  interpret: Any

  @property
  def rows(self) -> int:
    """Returns R, the rows of a query block."""
    return self.Q * self.G

  @property
  def words(self) -> int:
    """Returns W, the words of a query block's bits."""
    return -(-self.Q // 32)

  @property
  def read(self) -> int:
    """Returns L: an unaligned block is read with what stands around it."""
    return self.block + ALIGN * self.packed

  @property
  def parts(self) -> tuple[slice, ...]:
    """Returns parts of a query block's rows, which are worked on beside each other."""
    width = PART if self.rows % PART == 0 else self.rows
    return tuple(slice(at, at + width) for at in range(0, self.rows, width))

  @property
  def stacked(self) -> int:
    """Returns the number of blocks of a tile."""
    return max(1, TILE_KEYS // self.block)


def unsupported(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, options: Options
) -> str | None:
  """Returns why the kernels cannot run this call, or None if they can."""
  interpret, dtype = options.interpret, q_BTNH.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"q_BTNH.dtype={dtype}, the MXU multiplies float32 and bfloat16"
  if (reason := why_no_tpu(interpret)) is not None:
    return reason
  if options.sizes.block % ALIGN:
    return f"block={options.sizes.block} is not a multiple of {ALIGN}"
  if interpret:
    return None
  S, H, U = k_BSKH.shape[1], k_BSKH.shape[3], v_BSKU.shape[3]
  held = S * (round_up(H, LANES) + round_up(U, LANES)) * dtype.itemsize
  vmem = pltpu.get_tpu_info().vmem_capacity_bytes
  if held > 0.75 * vmem:
    return f"S={S}: keys and values of one head take {held} bytes of the {vmem} of VMEM"
  return None


def query_block(G: int) -> int:
  """Returns Q: at least PART rows in whole lanes, and twice as many if that is few queries.

  More queries have larger unions, fewer rows leave the MXU waiting.
  """
  Q = LANES // math.gcd(G, LANES)
  Q *= max(1, -(-PART // (Q * G)))
  return 2 * Q if Q <= 16 else Q


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  indices_BTKI: jax.Array,
  places: Places,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, U] and the logsumexp of the logits [B, T, N]."""
  B, T, N, H = q_BTNH.shape
  S, K, U = v_BSKU.shape[1:]
  G, block, interpret = N // K, options.sizes.block, options.interpret
  Q = 8 if interpret else query_block(G)
  plan = Plan(S, G, Q, block, places.firsts_BT is not None, abs(options.scale), interpret)
  q_BTNH = -q_BTNH if options.scale < 0 else q_BTNH
  start_BTKI = pairs.selected_starts(indices_BTKI, places, S, block)
  lists = unions.make_unions(start_BTKI, places, S, block, Q)
  X = lists.start_AXU.shape[1]
  q_BTKGH = pad_axis(pad_axis(q_BTNH.reshape(B, T, K, G, H), X * Q, 1), lanes(H, plan), 4)
  q_ATH = q_BTKGH.swapaxes(1, 2).reshape(B * K, X * Q * G, -1)

  def of_rows(x_BTK: jax.Array, fill: float) -> jax.Array:
    """Returns [A, X, 1, R]: what is known of a query, for each of its heads."""
    x_BTK = pad_axis(jnp.broadcast_to(x_BTK, (B, T, K)), X * Q, 1, fill)
    return jnp.repeat(x_BTK.swapaxes(1, 2).reshape(B * K, X, 1, Q), G, axis=3)

  def keys(x_BSKH: jax.Array) -> jax.Array:
    x_BSKH = pad_axis(x_BSKH, round_up(S, block) + ALIGN, 1)
    x_BKSH = pad_axis(x_BSKH, lanes(x_BSKH.shape[3], plan), 3).swapaxes(1, 2)
    return x_BKSH.reshape(B * K, *x_BKSH.shape[2:])

  (k_BSKH, bad_k_BSK), (v_BSKU, bad_v_BSK) = nonfinite.hide(k_BSKH), nonfinite.hide(v_BSKU)
  positions_BT1 = places.positions_BT[:, :, None]
  end_BTKI = jnp.minimum(start_BTKI + block, positions_BT1[..., None] + 1)
  end_BTKI = jnp.clip(end_BTKI, 0, S)
  bad_BTK, bad_key_BTK = (
    jnp.where(jnp.any(nonfinite.any_within(bad_BSK, start_BTKI, end_BTKI), axis=3), jnp.nan, 0)
    for bad_BSK in (bad_k_BSK | bad_v_BSK, bad_k_BSK)
  )
  known = Known(of_rows(positions_BT1, -1), of_rows(bad_BTK, 0), of_rows(bad_key_BTK, 0), lists)
  o_ATU, lse_AX1R = _attend(q_ATH, keys(k_BSKH), keys(v_BSKU), known, plan)
  o_BTNU = o_ATU.reshape(B, K, X * Q, G, -1).swapaxes(1, 2)[:, :T, ..., :U].reshape(B, T, N, U)
  lse_BTN = lse_AX1R.reshape(B, K, X * Q, G).swapaxes(1, 2)[:, :T].reshape(B, T, N)
  return o_BTNU, lse_BTN


class Known(NamedTuple):
  """Holds what is known of the rows of each query block before anything is multiplied."""

  positions_AX1R: jax.Array
  bad_AX1R: jax.Array  # NaN where a query sees a key or value that is not finite, else 0
  bad_key_AX1R: jax.Array  # likewise for a key
  lists: unions.Unions


def lanes(width: int, plan: Plan) -> int:
  """Returns the width that the kernels work on: whole lanes on a chip."""
  return width if plan.interpret else round_up(width, LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_ATH, k_ASH, v_ASU, known, plan):
  return _forward(q_ATH, k_ASH, v_ASU, known, plan)[0]


def _forward(q_ATH, k_ASH, v_ASU, known, plan):
  rows = known.lists.rows()
  o_ATU, lse_AX1R = call_forward(q_ATH, k_ASH, v_ASU, known.positions_AX1R, rows, plan)
  o_ATU += known.bad_AX1R.reshape(*o_ATU.shape[:2], 1).astype(o_ATU.dtype)
  lse_AX1R += known.bad_key_AX1R
  return (o_ATU, lse_AX1R), (q_ATH, k_ASH, v_ASU, known, o_ATU, lse_AX1R)


def _backward(plan, residuals, cotangents):
  q_ATH, k_ASH, v_ASU, known, o_ATU, lse_AX1R = residuals
  do_ATU, dlse_AX1R = cotangents
  mean_AT = jnp.sum(do_ATU.astype(jnp.float32) * o_ATU.astype(jnp.float32), axis=-1)
  blind_AX1R = jnp.isneginf(lse_AX1R)
  mean_AX1R = mean_AT.reshape(lse_AX1R.shape) - jnp.where(blind_AX1R, 0, dlse_AX1R)
  # in units of 2, and for a query that sees nothing so that exp2(logit - it) is 0
  lse_AX1R = jnp.where(blind_AX1R, jnp.inf, lse_AX1R * LOG2E)
  arrays = (q_ATH, do_ATU, k_ASH, v_ASU, known.positions_AX1R, lse_AX1R, mean_AX1R)
  dq_ATH = call_queries_gradient(*arrays, known.lists.rows(), plan)
  dk_ASH, dv_ASU = call_keys_gradient(*arrays, unions.invert(known.lists, plan.S, plan.block), plan)
  dk_ASH, dv_ASU = pad_axis(dk_ASH, k_ASH.shape[1], 1), pad_axis(dv_ASU, v_ASU.shape[1], 1)
  return dq_ATH, dk_ASH, dv_ASU, None


_attend.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------- parts of all


class Entry(NamedTuple):
  """Describes one entry of a union, as scalars of a kernel."""

  start: Any
  words: tuple[Any, ...]


def entry_of(list_ref: Any, index: Any, U: int, plan: Plan) -> Entry:
  """Reads an entry of `Unions.rows()`; past the end one that nobody selected."""
  inside = index < list_ref[0, 0, 0]
  index = jnp.minimum(index, U - 1)
  start = jnp.where(inside, list_ref[0, 0, 2 + index], 0)
  at = 2 + U + index * plan.words
  words = (jnp.where(inside, list_ref[0, 0, at + w], 0) for w in range(plan.words))
  return Entry(start, tuple(words))


def selected_rows(words: tuple[Any, ...], part: slice, plan: Plan) -> jax.Array:
  """Returns bool [1, C]: whether a row's query, for the rows of a part, selected the entry."""
  row_1R = part.start + jax.lax.broadcasted_iota(jnp.int32, (1, part.stop - part.start), 1)
  query_1R = row_1R // plan.G
  hit_1R = jnp.zeros_like(query_1R)
  for w, word in enumerate(words):
    bit_1R = jnp.right_shift(jnp.full_like(query_1R, word), query_1R % 32) & 1
    hit_1R = bit_1R if len(words) == 1 else jnp.where(query_1R // 32 == w, bit_1R, hit_1R)
  return hit_1R != 0


def read_block(ref: Any, start: Any, plan: Plan) -> jax.Array:
  """Returns L rows of the keys or values in VMEM, from the start or a little before."""
  return ref[0, pl.ds(read_from(start, plan), plan.read), :]


def read_tile(ref: Any, entries: list[Entry], plan: Plan) -> jax.Array:
  """Returns the rows of some entries, stacked to [Y, H or U]."""
  return jnp.concatenate([read_block(ref, entry.start, plan) for entry in entries], axis=0)


def read_from(start: Any, plan: Plan) -> Any:
  """Returns the first row that `read_block` reads."""
  align = ALIGN if plan.packed else plan.block
  return pl.multiple_of(start // align * align, align)


def seen_tokens(start: Any, positions_1R: jax.Array, plan: Plan) -> jax.Array:
  """Returns bool [L, R]: whether a row's query sees the tokens that `read_block` reads."""
  shape = (plan.read, positions_1R.shape[1])
  token_LR = read_from(start, plan) + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  seen_LR = token_LR <= positions_1R
  if plan.packed:
    seen_LR = seen_LR & (token_LR >= start) & (token_LR < start + plan.block)
  return seen_LR


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
  """Contracts one axis of each, with float32 sums and all digits of float32 inputs."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def over_tiles(list_ref: Any, plan: Plan, body: Any, carry: Any) -> Any:
  """Runs `body(tile, carry, masked)` over the tiles of a union, first those that need no mask."""
  tiles = pl.cdiv(list_ref[0, 0, 0], plan.stacked)
  plain = jnp.int32(0) if plan.packed else list_ref[0, 0, 1] // plan.stacked
  carry = jax.lax.fori_loop(0, plain, functools.partial(body, masked=False), carry)
  return jax.lax.fori_loop(plain, tiles, functools.partial(body, masked=True), carry)


def compiler_params(plan: Plan) -> pltpu.CompilerParams:
  """Returns the kernels' parameters: no step depends on another."""
  vmem = 64 * 2**20 if plan.interpret else pltpu.get_tpu_info().vmem_capacity_bytes
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=int(0.95 * vmem)
  )


# ------------------------------------------------------------------------------------ forward


def call_forward(q_ATH, k_ASH, v_ASU, positions_AX1R, rows, plan: Plan):
  """Returns the output [A, T * G, U] and the logsumexp [A, X, 1, R]."""
  (A, _, H), S, U = q_ATH.shape, k_ASH.shape[1], v_ASU.shape[2]
  X, R = positions_AX1R.shape[1], plan.rows
  once = pl.Buffered(1)
  lane_block = pl.BlockSpec((1, 1, 1, R), lambda a, x: (a, x, 0, 0))
  return pl.pallas_call(
    functools.partial(forward_kernel, plan=plan),
    grid=(A, X),
    in_specs=[
      list_block(rows, X),
      pl.BlockSpec((1, R, H), lambda a, x: (a, x, 0)),
      pl.BlockSpec((1, S, H), lambda a, x: (a, 0, 0), pipeline_mode=once),
      pl.BlockSpec((1, S, U), lambda a, x: (a, 0, 0), pipeline_mode=once),
      lane_block,
    ],
    out_specs=[pl.BlockSpec((1, R, U), lambda a, x: (a, x, 0)), lane_block],
    out_shape=[
      varying_struct((A, X * R, U), q_ATH.dtype, q_ATH),
      varying_struct((A, X, 1, R), jnp.float32, q_ATH),
    ],
    scratch_shapes=[
      pltpu.VMEM((U, R), jnp.float32),
      pltpu.VMEM((plan.stacked * plan.read, R), jnp.float32),
    ],
    compiler_params=compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_forward",
  )(rows, q_ATH, k_ASH, v_ASU, positions_AX1R)


def list_block(rows: jax.Array, X: int) -> pl.BlockSpec:
  """Returns the block of a query block's list, in scalar memory."""
  shape = (1, 1, rows.shape[2])
  return pl.BlockSpec(shape, lambda a, x: (a * X + x, 0, 0), memory_space=pltpu.SMEM)


def forward_kernel(list_ref, q, k, v, positions, o, lse, sum_UR, a_YR, *, plan: Plan):
  """Attends with one query block to the blocks of its union."""
  U = (list_ref.shape[2] - 2) // (1 + plan.words)
  factor = plan.scale * LOG2E
  sum_UR[...] = jnp.zeros_like(sum_UR)

  def entries_of(tile):
    return [entry_of(list_ref, tile * plan.stacked + i, U, plan) for i in range(plan.stacked)]

  def add_tile(tile, carry, *, masked):
    entries, sums = entries_of(tile), []
    v_YU = read_tile(v, entries, plan)
    next_YH = read_tile(k, entries_of(tile + 1), plan)
    for part, (max_1C, mass_1C) in zip(plan.parts, carry):
      new_1C, chosen = max_1C, []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        if masked:
          seen_LC = seen_tokens(entry.start, positions[0, 0, :, part], plan)
          a_YR[at, part] = jnp.where(seen_LC, a_YR[at, part], -jnp.inf)
        chosen.append(selected_rows(entry.words, part, plan))
        top_1C = factor * jnp.max(a_YR[at, part], axis=0, keepdims=True)
        new_1C = jnp.maximum(new_1C, jnp.where(chosen[i], top_1C, -jnp.inf))
      finite_1C = jnp.where(new_1C == -jnp.inf, 0.0, new_1C)
      e_YC = jnp.concatenate(
        [
          jnp.exp2(
            factor * a_YR[pl.ds(i * plan.read, plan.read), part]
            - jnp.where(chosen_1C, finite_1C, jnp.inf)
          )
          for i, chosen_1C in enumerate(chosen)
        ],
        axis=0,
      )
      # the next tile's logits, which the MXU makes while this one's exponentials are made
      a_YR[:, part] = dot(next_YH, q[0, part], 1, 1)
      kept_1C = jnp.exp2(max_1C - finite_1C)
      mass_1C = mass_1C * kept_1C + jnp.sum(e_YC, axis=0, keepdims=True)
      sum_UR[:, part] = sum_UR[:, part] * kept_1C + dot(v_YU, e_YC.astype(v_YU.dtype), 0, 0)
      sums.append((new_1C, mass_1C))
    return tuple(sums)

  first_YH = read_tile(k, entries_of(0), plan)
  start = []
  for part in plan.parts:
    a_YR[:, part] = dot(first_YH, q[0, part], 1, 1)
    zero_1C = jnp.zeros((1, part.stop - part.start), jnp.float32)
    start.append((zero_1C - jnp.inf, zero_1C))
  sums = over_tiles(list_ref, plan, add_tile, tuple(start))
  for part, (max_1C, mass_1C) in zip(plan.parts, sums):
    blind_1C = mass_1C == 0
    mass_1C = jnp.where(blind_1C, 1.0, mass_1C)
    o[0, part] = (sum_UR[:, part] / mass_1C).T.astype(o.dtype)
    lse_1C = jnp.where(blind_1C, -jnp.inf, (max_1C + jnp.log2(mass_1C)) / LOG2E)
    lse[0, 0, :, part] = lse_1C


# ----------------------------------------------------------------------- gradient of the queries


def call_queries_gradient(q_ATH, do_ATU, k_ASH, v_ASU, positions, lse, mean, rows, plan: Plan):
  """Returns dq [A, T * G, H]."""
  (A, _, H), S, U = q_ATH.shape, k_ASH.shape[1], v_ASU.shape[2]
  X, R = positions.shape[1], plan.rows
  once = pl.Buffered(1)
  lane_block = pl.BlockSpec((1, 1, 1, R), lambda a, x: (a, x, 0, 0))
  return pl.pallas_call(
    functools.partial(queries_gradient_kernel, plan=plan),
    grid=(A, X),
    in_specs=[
      list_block(rows, X),
      pl.BlockSpec((1, R, H), lambda a, x: (a, x, 0)),
      pl.BlockSpec((1, R, U), lambda a, x: (a, x, 0)),
      pl.BlockSpec((1, S, H), lambda a, x: (a, 0, 0), pipeline_mode=once),
      pl.BlockSpec((1, S, U), lambda a, x: (a, 0, 0), pipeline_mode=once),
      lane_block,
      lane_block,
      lane_block,
    ],
    out_specs=pl.BlockSpec((1, R, H), lambda a, x: (a, x, 0)),
    out_shape=varying_struct(q_ATH.shape, q_ATH.dtype, q_ATH),
    scratch_shapes=[
      pltpu.VMEM((H, R), jnp.float32),
      pltpu.VMEM((plan.stacked * plan.read, R), jnp.float32),
      pltpu.VMEM((plan.stacked * plan.read, R), jnp.float32),
    ],
    compiler_params=compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_dq",
  )(rows, q_ATH, do_ATU, k_ASH, v_ASU, positions, lse, mean)


def queries_gradient_kernel(
  list_ref, q, do, k, v, positions, lse, mean, dq, sum_HR, a_YR, dp_YR, *, plan: Plan
):
  """Sums the gradient of one query block over the blocks of its union."""
  U = (list_ref.shape[2] - 2) // (1 + plan.words)
  factor = plan.scale * LOG2E
  sum_HR[...] = jnp.zeros_like(sum_HR)

  def entries_of(tile):
    return [entry_of(list_ref, tile * plan.stacked + i, U, plan) for i in range(plan.stacked)]

  def read_both(tile):
    return (read_tile(ref, entries_of(tile), plan) for ref in (k, v))

  def multiply(k_YH, v_YU, part):
    """Makes logits and the gradients of probabilities, for the rows of a part."""
    a_YR[:, part] = dot(k_YH, q[0, part], 1, 1)
    dp_YR[:, part] = dot(v_YU, do[0, part], 1, 1)

  def add_tile(tile, carry, *, masked):
    entries = entries_of(tile)
    k_YH, (next_YH, next_YU) = read_tile(k, entries, plan), read_both(tile + 1)
    for part in plan.parts:
      gradients = []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        a_LC = factor * a_YR[at, part]
        if masked:
          a_LC = jnp.where(seen_tokens(entry.start, positions[0, 0, :, part], plan), a_LC, -jnp.inf)
        chosen_1C = selected_rows(entry.words, part, plan)
        p_LC = jnp.exp2(a_LC - jnp.where(chosen_1C, lse[0, 0, :, part], jnp.inf))
        gradients.append(p_LC * (dp_YR[at, part] - mean[0, 0, :, part]))
      multiply(next_YH, next_YU, part)  # of the next tile, while this one's da is made
      da_YC = jnp.concatenate(gradients, axis=0).astype(k_YH.dtype)
      sum_HR[:, part] += dot(k_YH, da_YC, 0, 0)
    return carry

  first_YH, first_YU = read_both(0)
  for part in plan.parts:
    multiply(first_YH, first_YU, part)
  over_tiles(list_ref, plan, add_tile, 0)
  dq[0] = (plan.scale * sum_HR[...]).T.astype(dq.dtype)


# ------------------------------------------------------------------- gradient of keys and values


class Copies(NamedTuple):
  """Holds two sets of buffers for what is copied of some query blocks, and their semaphores."""

  q: Any  # [2, COPIED, R, H]
  do: Any
  rows: Any  # [2, COPIED, 3, R]: positions as floats, lse, mean
  done: Any


def call_keys_gradient(q_ATH, do_ATU, k_ASH, v_ASU, positions, lse, mean, inverse, plan: Plan):
  """Returns dk [A, J * block, H] and dv [A, J * block, U]."""
  (A, _, H), U = q_ATH.shape, v_ASU.shape[2]
  X, R, J, block = positions.shape[1], plan.rows, inverse.first_AJ.shape[1], plan.block
  # float32 holds positions exactly up to 2^24
  of_rows = jnp.concatenate([positions.astype(jnp.float32), lse, mean], axis=2).reshape(A * X, 3, R)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  k_block = pl.BlockSpec((1, block, H), lambda a, j, *_: (a, j, 0))
  v_block = pl.BlockSpec((1, block, U), lambda a, j, *_: (a, j, 0))
  dtype = q_ATH.dtype
  return pl.pallas_call(
    functools.partial(keys_gradient_kernel, X=X, plan=plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(A, J),
      in_specs=[anywhere, anywhere, anywhere, anywhere, k_block, v_block],
      out_specs=[k_block, v_block],
      scratch_shapes=[
        pltpu.SMEM((1, 1, unions.ROW), jnp.int32),
        pltpu.SemaphoreType.DMA,
        Copies(
          q=pltpu.VMEM((2, COPIED, R, H), dtype),
          do=pltpu.VMEM((2, COPIED, R, U), dtype),
          rows=pltpu.VMEM((2, COPIED, 3, R), jnp.float32),
          done=pltpu.SemaphoreType.DMA((2, COPIED, 3)),
        ),
        pltpu.VMEM((block, H), jnp.float32),
        pltpu.VMEM((block, U), jnp.float32),
      ],
    ),
    out_shape=[
      varying_struct((A, J * block, H), dtype, q_ATH),
      varying_struct((A, J * block, U), dtype, q_ATH),
    ],
    compiler_params=compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_dkv",
  )(
    inverse.first_AJ.reshape(-1),
    inverse.last_AJ.reshape(-1),
    inverse.rows,
    q_ATH.reshape(A * X, R, H),
    do_ATU.reshape(A * X, R, U),
    of_rows,
    k_ASH,
    v_ASU,
  )


def keys_gradient_kernel(
  first_ref,
  last_ref,
  lists,
  q_hbm,
  do_hbm,
  rows_hbm,
  k,
  v,
  dk,
  dv,
  list_ref,
  listed,
  copies,
  dk_LH,
  dv_LU,
  *,
  X: int,
  plan: Plan,
):
  """Sums the gradients of one block of keys over the query blocks that selected it."""
  a, j = pl.program_id(0), pl.program_id(1)
  at = a * pl.num_programs(1) + j
  first, last = first_ref[at], last_ref[at]
  E = unions.entries_of_row(plan.words)
  rows_per_head = lists.shape[0] // pl.num_programs(0)
  dk_LH[...] = jnp.zeros_like(dk_LH)
  dv_LU[...] = jnp.zeros_like(dv_LU)

  def field(entry, number):
    return list_ref[0, 0, (entry % E) * (2 + plan.words) + number]

  def add_row(row, _):
    """Adds the entries of one row of the list."""
    to_list = pltpu.make_async_copy(lists.at[pl.ds(a * rows_per_head + row, 1)], list_ref, listed)
    to_list.start()
    to_list.wait()
    begin, end = jnp.maximum(first, row * E), jnp.minimum(last, (row + 1) * E)

    def transfers(group, slot):
      for i in range(COPIED):
        entry = jnp.minimum(begin + group * COPIED + i, end - 1)
        block = a * X + field(entry, 0)
        for n, (source, target) in enumerate(
          ((q_hbm, copies.q), (do_hbm, copies.do), (rows_hbm, copies.rows))
        ):
          done = copies.done.at[slot, i, n]
          yield pltpu.make_async_copy(source.at[block], target.at[slot, i], done)

    groups = pl.cdiv(end - begin, COPIED)
    for transfer in transfers(0, 0):
      transfer.start()

    def add_group(group, _):
      slot = group % 2

      @pl.when(group + 1 < groups)
      def copy_ahead():
        for transfer in transfers(group + 1, 1 - slot):
          transfer.start()

      for transfer in transfers(group, slot):
        transfer.wait()
      for i in range(COPIED):
        entry = begin + group * COPIED + i
        inside = entry < end
        entry = jnp.minimum(entry, end - 1)
        words = tuple(jnp.where(inside, field(entry, 2 + w), 0) for w in range(plan.words))
        of_rows = tuple(copies.rows[slot, i, n : n + 1] for n in range(3))
        add_query_block(
          copies.q[slot, i],
          copies.do[slot, i],
          of_rows,
          field(entry, 1),
          words,
          j,
          k,
          v,
          dk_LH,
          dv_LU,
          plan,
        )
      return 0

    return jax.lax.fori_loop(0, groups, add_group, 0)

  jax.lax.fori_loop(first // E, pl.cdiv(last, E), add_row, 0)
  dk[0] = (plan.scale * dk_LH[...]).astype(dk.dtype)
  dv[0] = dv_LU[...].astype(dv.dtype)


def add_query_block(q_RH, do_RU, of_rows, start, words, j, k, v, dk_LH, dv_LU, plan: Plan):
  """Adds what one query block gives to the gradients of a block of keys."""
  positions_1R, lse_1R, mean_1R = of_rows
  shape = (plan.block, plan.rows)
  token_LR = j * plan.block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  seen_LR = token_LR.astype(jnp.float32) <= positions_1R
  if plan.packed:
    seen_LR = seen_LR & (token_LR >= start) & (token_LR < start + plan.block)
  # a query that did not select the block may hold NaN, which must not reach the sums
  seen_LR = seen_LR & selected_rows(words, slice(0, plan.rows), plan)
  a_LR = (plan.scale * LOG2E) * dot(k[0], q_RH, 1, 1)
  p_LR = jnp.where(seen_LR, jnp.exp2(a_LR - lse_1R), 0.0)
  da_LR = jnp.where(seen_LR, p_LR * (dot(v[0], do_RU, 1, 1) - mean_1R), 0.0)
  dv_LU[...] += dot(p_LR.astype(do_RU.dtype), do_RU, 1, 0)
  dk_LH[...] += dot(da_LR.astype(q_RH.dtype), q_RH, 1, 0)
