"""Attends to selected blocks on Hopper (Pallas Mosaic GPU), a program for each query or key block.

Queries, their outputs and their gradients go through each query's list (`gpu_forward`,
`gpu_queries_gradient`), keys and values through the queries that selected them, by the lists'
inverse (`gpu_keys_gradient`): each gradient has one writer and sums have a fixed order. Operands of
products are 16 bits wide, sums and softmax float32.

Values are tested in the simulator of a GPU (shared memory, TMA, barriers, races; jax 0.11 and
later), and it lowers for Hopper on jax 0.10 to 0.12. No GPU has run it.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G heads of a group,
# H width of queries and keys, U width of values, A = B * K, Z = A * T queries,
# I selected blocks of a query
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.hopper import ROWS, SMEM_BYTES, WIDEST
from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.sparse_attention import nonfinite, pairs
from pallas_kernels.sparse_attention.gpu_forward import LANES, STAGES, Lists, Plan, call_forward
from pallas_kernels.sparse_attention.gpu_keys_gradient import call_keys_gradient
from pallas_kernels.sparse_attention.gpu_queries_gradient import RowValues, call_queries_gradient
from pallas_kernels.sparse_attention.places import Options, Places


def unsupported(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, options: Options
) -> str | None:
  """Returns why the kernels cannot run this call, or None if they can."""
  dtype, block = q_BTNH.dtype, options.sizes.block
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"q_BTNH.dtype={dtype}, the tensor cores take bfloat16 and float16"
  G, H, U = q_BTNH.shape[2] // k_BSKH.shape[2], q_BTNH.shape[3], v_BSKU.shape[3]
  if G > ROWS:
    return f"q_BTNH.shape={q_BTNH.shape}: a group of G={G} heads is more than {ROWS}"
  if max(H, U, block) > WIDEST:
    return f"H={H}, U={U}, block={block} may be at most {WIDEST}"
  wide, keys = round_up(H, LANES) + round_up(U, LANES), round_up(block, LANES)
  used = dtype.itemsize * (STAGES * wide * keys + ROWS * (wide + keys)) + 1024
  if used > SMEM_BYTES:
    return f"H={H}, U={U}, block={block} take {used} bytes of the {SMEM_BYTES} of shared memory"
  return why_no_hopper(options.interpret)


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
  padded_G = max(8, 1 << (G - 1).bit_length())
  plan = Plan(T, S, padded_G, block, options.scale, options.interpret)
  start_BTKI = pairs.selected_starts(indices_BTKI, places, S, block)

  def by_query(x_BTK: jax.Array) -> jax.Array:
    """Returns [Z, ...] of [B or 1, T, K or 1, ...]."""
    x_BTK = jnp.broadcast_to(x_BTK, (B, T, K, *x_BTK.shape[3:]))
    return x_BTK.swapaxes(1, 2).reshape(B * K * T, *x_BTK.shape[3:])

  def by_key(x_BSKH: jax.Array) -> jax.Array:
    x_BSKH = pad_axis(x_BSKH, round_up(S, LANES) + plan.keys, 1)  # a block may begin anywhere
    x_BSKH = pad_axis(x_BSKH, round_up(x_BSKH.shape[3], LANES), 3)
    return x_BSKH.swapaxes(1, 2).reshape(B * K, -1, x_BSKH.shape[3])

  (k_BSKH, bad_k_BSK), (v_BSKU, bad_v_BSK) = nonfinite.hide(k_BSKH), nonfinite.hide(v_BSKU)
  positions_BT1 = places.positions_BT[:, :, None]
  end_BTKI = jnp.clip(jnp.minimum(start_BTKI + block, positions_BT1[..., None] + 1), 0, S)
  bad_Z, bad_key_Z = (
    by_query(jnp.any(nonfinite.any_within(bad_BSK, start_BTKI, end_BTKI), axis=3))
    for bad_BSK in (bad_k_BSK | bad_v_BSK, bad_k_BSK)
  )
  q_ZGH = by_query(q_BTNH.reshape(B, T, K, G, H))
  q_ZGH = pad_axis(pad_axis(q_ZGH, plan.G, 1), round_up(H, LANES), 2)
  start_ZI = by_query(jnp.sort(start_BTKI, axis=-1))
  count_Z = jnp.sum(start_ZI < S, axis=-1, dtype=jnp.int32)
  known = Known(Lists(start_ZI, count_Z, by_query(positions_BT1)), bad_Z, bad_key_Z)
  o_ZGU, lse_ZG = _attend(q_ZGH, by_key(k_BSKH), by_key(v_BSKU), known, plan)
  o_BKTGU = o_ZGU[:, :G, :U].reshape(B, K, T, G, U)
  lse_BKTG = lse_ZG[:, :G].reshape(B, K, T, G)
  return o_BKTGU.swapaxes(1, 2).reshape(B, T, N, U), lse_BKTG.swapaxes(1, 2).reshape(B, T, N)


class Known(NamedTuple):
  """Holds what is known of queries before anything is multiplied."""

  lists: Lists
  bad_Z: jax.Array  # whether the query sees a key or value that is not finite
  bad_key_Z: jax.Array  # likewise for a key


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_ZGH, k_ASH, v_ASU, known, plan):
  return _forward(q_ZGH, k_ASH, v_ASU, known, plan)[0]


def _forward(q_ZGH, k_ASH, v_ASU, known, plan):
  o_ZGU, lse_ZG = call_forward(q_ZGH, k_ASH, v_ASU, known.lists, plan)
  o_ZGU = jnp.where(known.bad_Z[:, None, None], jnp.nan, o_ZGU)
  lse_ZG = jnp.where(known.bad_key_Z[:, None], jnp.nan, lse_ZG)
  return (o_ZGU, lse_ZG), (q_ZGH, k_ASH, v_ASU, known, o_ZGU, lse_ZG)


def _backward(plan, residuals, cotangents):
  q_ZGH, k_ASH, v_ASU, known, o_ZGU, lse_ZG = residuals
  do_ZGU, dlse_ZG = cotangents
  mean_ZG = jnp.sum(do_ZGU.astype(jnp.float32) * o_ZGU.astype(jnp.float32), axis=-1)
  mean_ZG -= jnp.where(jnp.isneginf(lse_ZG), 0, dlse_ZG)
  q_ZGH, do_ZGU, bad_ZG = nonfinite.hide_rows(q_ZGH, do_ZGU, lse_ZG)
  lse_ZG = jnp.where(bad_ZG, jnp.nan, lse_ZG)
  # repeated, so that rows of several queries in one product are read where they are
  values = RowValues(*(jnp.tile(x_ZG, (1, ROWS // plan.G)) for x_ZG in (lse_ZG, mean_ZG)))
  arrays = (q_ZGH, do_ZGU, k_ASH, v_ASU, values, known.lists)
  dk_ASH, dv_ASU = call_keys_gradient(*arrays, plan)
  return call_queries_gradient(*arrays, plan), dk_ASH, dv_ASU, None


_attend.defvjp(_forward, _backward)
