"""Attends to selected blocks on TPU (Pallas Mosaic), by blocks of queries and their unions.

The keys and values of one key head stay in VMEM. A query block is so few positions Q that with
their G heads they fill the lanes, for its union grows with Q and everything in a union is
multiplied. A group of query blocks, each with its own union, is worked on at one time, so that the
MXU multiplies for one while the vector unit works on another. A grid step has several groups and
sorts its query blocks by their unions, since a group lasts as long as its longest. Blocks of a
union are read by their place and stacked to a tile of keys. Tiles are transposed, [keys, R], so
that what belongs to a query lies along the lanes. A query that did not select a block subtracts
infinity there in place of its maximum: the mask costs nothing per entry, and only blocks that reach
past the first query compare positions.

Backward: one kernel makes all gradients by the same unions, and holds those of a head's keys and
values in VMEM. Where they do not fit, it makes the queries' alone, and another kernel goes through
the query blocks of each block of keys. Each gradient has one writer and sums have a fixed order.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# B batch, T query positions, S key positions, K key heads, N query heads, H width of queries and
# keys, U width of values, A = B * K, G heads of a group, Q queries and R = Q * G rows of a query
# block, X query blocks of a row and head
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.sparse_attention import nonfinite, pairs, unions
from pallas_kernels.sparse_attention.places import Options, Places
from pallas_kernels.sparse_attention.tpu_forward import call_forward
from pallas_kernels.sparse_attention.tpu_gradients import call_gradients
from pallas_kernels.sparse_attention.tpu_keys_gradient import call_keys_gradient
from pallas_kernels.sparse_attention.tpu_tiles import ALIGN, LANES, LOG2E, Plan

GROUP_ROWS = 1024  # of the query blocks that a kernel works on beside each other
GROUPS = 8  # of a grid step
STEP_SHARE = 32  # one of so many parts of VMEM is for its queries, as wide as keys and values
TILE_KEYS = 256
LIST_ENTRIES = 2**14  # of their unions, which are in scalar memory


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


def make_plan(
  q_BTNH: jax.Array, v_BSKU: jax.Array, I: int, places: Places, options: Options
) -> Plan:
  """Returns the sizes of the kernels for lists of I blocks.

  A query block has the fewest queries whose rows are whole lanes: unions grow with the queries.
  """
  (_, T, N, H), (_, S, K, U) = q_BTNH.shape, v_BSKU.shape
  G, block, itemsize = N // K, options.sizes.block, q_BTNH.dtype.itemsize
  together = True
  if options.interpret:  # few of everything, which compiles soon
    Q, abreast, groups, stacked = 8, 2, 2, 2
  else:
    Q, stacked = LANES // math.gcd(G, LANES), max(1, TILE_KEYS // block)
    abreast = max(1, min(GROUP_ROWS // (Q * G), LIST_ENTRIES // (Q * I)))
    width = round_up(H, LANES) + round_up(U, LANES)
    group_bytes = abreast * Q * G * width * itemsize
    vmem = pltpu.get_tpu_info().vmem_capacity_bytes
    most = min(vmem // STEP_SHARE // group_bytes, LIST_ENTRIES // (abreast * Q * I))
    groups = max(1, min(GROUPS, most, -(-T // (abreast * Q))))
    together = S * width * (itemsize + 4) <= 0.8 * vmem  # with sums in float32
  packed, scale = places.firsts_BT is not None, abs(options.scale)
  sizes = (S, G, Q, abreast, groups, stacked, block)
  return Plan(*sizes, packed, scale, together, options.interpret)


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
  G, block = N // K, options.sizes.block
  plan = make_plan(q_BTNH, v_BSKU, indices_BTKI.shape[3], places, options)
  Q = plan.Q
  X = round_up(T, Q * plan.step_blocks) // Q
  q_BTNH = -q_BTNH if options.scale < 0 else q_BTNH
  start_BTKI = pairs.selected_starts(indices_BTKI, places, S, block)
  lists = unions.make_unions(start_BTKI, places, S, block, Q, X)
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
  lists = known.lists.rows(plan.stacked, plan.step_blocks)
  o_ATU, log2_AX1R = call_forward(q_ATH, k_ASH, v_ASU, known.positions_AX1R, lists, plan)
  o_ATU += known.bad_AX1R.reshape(*o_ATU.shape[:2], 1).astype(o_ATU.dtype)
  log2_AX1R += known.bad_key_AX1R
  # to the base 2 also for the backward pass: of logits of 1e4 another rounding is 1e-3
  return (o_ATU, log2_AX1R / LOG2E), (q_ATH, k_ASH, v_ASU, known, o_ATU, log2_AX1R)


def _backward(plan, residuals, cotangents):
  q_ATH, k_ASH, v_ASU, known, o_ATU, log2_AX1R = residuals
  do_ATU, dlse_AX1R = cotangents
  mean_AT = jnp.sum(do_ATU.astype(jnp.float32) * o_ATU.astype(jnp.float32), axis=-1)
  blind_AX1R = jnp.isneginf(log2_AX1R)
  mean_AX1R = mean_AT.reshape(log2_AX1R.shape) - jnp.where(blind_AX1R, 0, dlse_AX1R)
  # for a query that sees nothing so that exp2(logit - it) is 0
  lse_AX1R = jnp.where(blind_AX1R, jnp.inf, log2_AX1R)
  q_ATH, do_ATU, lse_AX1R = _hide_bad_rows(q_ATH, do_ATU, lse_AX1R)
  arrays = (q_ATH, do_ATU, k_ASH, v_ASU)
  of_rows = (known.positions_AX1R, lse_AX1R, mean_AX1R)
  lists = known.lists.rows(plan.stacked, plan.step_blocks)
  dq_ATH, *of_keys = call_gradients(*arrays, *of_rows, lists, plan)
  if plan.together:
    dk_ASH, dv_ASU = plan.scale * of_keys[0], of_keys[1]
  else:
    inverse = unions.invert(known.lists, plan.S, plan.block)
    dk_ASH, dv_ASU = call_keys_gradient(*arrays, *of_rows, inverse, plan)
    dk_ASH, dv_ASU = pad_axis(dk_ASH, k_ASH.shape[1], 1), pad_axis(dv_ASU, v_ASU.shape[1], 1)
  return dq_ATH, dk_ASH.astype(k_ASH.dtype), dv_ASU.astype(v_ASU.dtype), None


_attend.defvjp(_forward, _backward)


def _hide_bad_rows(q_ATH, do_ATU, lse_AX1R):
  """Returns queries and gradients without bad rows, whose logsumexp is NaN; writes only if any."""

  def hide(_, arrays):
    q_ATH, do_ATU, lse_AX1R = arrays
    q_ATH, do_ATU, bad_AT = nonfinite.hide_rows(q_ATH, do_ATU, lse_AX1R.reshape(q_ATH.shape[:2]))
    return q_ATH, do_ATU, jnp.where(bad_AT.reshape(lse_AX1R.shape), jnp.nan, lse_AX1R)

  fine = jnp.all(jnp.isfinite(q_ATH)) & jnp.all(jnp.isfinite(do_ATU))
  return jax.lax.fori_loop(0, jnp.where(fine, 0, 1), hide, (q_ATH, do_ATU, lse_AX1R))
