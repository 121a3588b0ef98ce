"""Selects blocks: scores of compressed blocks, pooled to blocks, the best of each query.

Source: arXiv 2502.11089, equations 8 to 10. Nothing here has a gradient.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# C compressed blocks, J blocks of a segment, I selected blocks of a query, Q queries of a step
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.sparse_attention.places import BlockSizes, Options, Places, visible_blocks

STEP_BYTES = 2**26  # of the probabilities of one step's queries, over all rows and heads


def select(
  q_BTNH: jax.Array,
  k_BCKH: jax.Array,
  lse_BTN: jax.Array,
  starts_BC: jax.Array,
  places: Places,
  S: int,
  options: Options,
) -> jax.Array:
  """Returns the selected blocks of each query, int32 [B, T, K, I] ascending, then -1.

  `lse_BTN` is the log-sum-exp of the logits of the compressed blocks that a query sees, and S the
  number of keys. Queries go a few at a time: memory is linear in T and in C.
  """
  (B, T, N, _), C = q_BTNH.shape, k_BCKH.shape[1]
  Q = min(T, max(8, STEP_BYTES // max(4 * B * N * C, 1) // 8 * 8))
  padded = round_up(T, Q)

  def steps(x: jax.Array, fill: float = 0) -> jax.Array:
    """Returns [steps, B or 1, Q, ...]."""
    x = pad_axis(x, padded, 1, fill)
    return x.reshape(x.shape[0], padded // Q, Q, *x.shape[2:]).swapaxes(0, 1)

  def one_step(step: tuple[jax.Array, jax.Array, Places]) -> jax.Array:
    q_BQNH, lse_BQN, here = step
    p_BKQC = group_probabilities(q_BQNH, k_BCKH, lse_BQN, starts_BC, here, options)
    p_BKQC = from_segment_start(p_BKQC, starts_BC, here)
    return best_blocks(pool(p_BKQC, S, options.sizes), here, options.sizes)

  firsts = None if places.firsts_BT is None else steps(places.firsts_BT)
  places_of_steps = Places(steps(places.positions_BT, -1), firsts)
  out = jax.lax.map(one_step, (steps(q_BTNH), steps(lse_BTN), places_of_steps))
  return out.swapaxes(0, 1).reshape(B, padded, *out.shape[3:])[:, :T]


def group_probabilities(
  q_BTNH: jax.Array,
  k_BCKH: jax.Array,
  lse_BTN: jax.Array,
  starts_BC: jax.Array,
  places: Places,
  options: Options,
) -> jax.Array:
  """Returns softmax over the compressed blocks, summed over a group's heads, [B, K, T, C]."""
  B, T, N, H = q_BTNH.shape
  K = k_BCKH.shape[2]
  dtype = lse_BTN.dtype
  a_BKTGC = options.scale * jnp.einsum(
    "btkgh,bckh->bktgc",  # in the order of its product: a transpose takes longer on CPU
    q_BTNH.reshape(B, T, K, N // K, H),
    k_BCKH,
    preferred_element_type=dtype,
    precision=jax.lax.Precision.HIGHEST,
  )
  seen_BTC = visible_blocks(places, starts_BC, options.sizes.length)[:, None, :, None]
  lse_BKTG = lse_BTN.reshape(B, T, K, N // K).swapaxes(1, 2)
  return jnp.sum(jnp.where(seen_BTC, jnp.exp(a_BKTGC - lse_BKTG[..., None]), 0), axis=3)


def from_segment_start(p_BKTC: jax.Array, starts_BC: jax.Array, places: Places) -> jax.Array:
  """Moves the first block of a query's segment to place 0 of the last axis.

  A query sees blocks of its own segment only, and rows without segments have one start for all.
  """
  if places.firsts_BT is None or starts_BC.shape[1] == 0:
    return p_BKTC
  C = p_BKTC.shape[-1]
  before_BT = jnp.sum(starts_BC[:, None, :] < places.firsts_BT[:, :, None], axis=-1)
  at_B1TC = before_BT[:, None, :, None] + jnp.arange(C)[None, None, None]
  moved_BKTC = jnp.take_along_axis(p_BKTC, jnp.minimum(at_B1TC, C - 1), axis=-1)
  return jnp.where(at_B1TC < C, moved_BKTC, 0)


def pool(p_BKTC: jax.Array, S: int, sizes: BlockSizes) -> jax.Array:
  """Returns the scores of blocks, [B, K, T, J]: sums over the strides that blocks share.

  sum_{m < l'/d} sum_{r < l/d} p[j l'/d + m - r], where p outside of its range is 0. It is equation
  9 with indices that count from 1, and for 32, 16, 64 weights 1, 2, 2, 2, 1.
  """
  ahead, back = sizes.block // sizes.stride, sizes.length // sizes.stride
  J = -(-S // sizes.block)
  padding = [(0, 0)] * 3 + [(back - 1, max(0, J * ahead + back - p_BKTC.shape[-1]))]
  padded = jnp.pad(p_BKTC, padding)
  total = jnp.zeros((*p_BKTC.shape[:3], J), p_BKTC.dtype)
  for place in range(ahead + back - 1):  # of p, from back - 1 before the block's first
    offset = place - (back - 1)
    weight = sum(0 <= m - offset < back for m in range(ahead))
    total += weight * padded[..., place : place + (J - 1) * ahead + 1 : ahead]
  return total


def best_blocks(scores_BKTJ: jax.Array, places: Places, sizes: BlockSizes) -> jax.Array:
  """Returns the blocks with the highest scores, ascending, int32 [B, T, K, I], then -1.

  Always chosen are a segment's first block, the query's own and the one before it; never chosen
  are those after the query's own. Of equal scores the lower index wins.
  """
  J = scores_BKTJ.shape[-1]
  own_BT = jnp.where(places.positions_BT < 0, -1, places.offsets_BT() // sizes.block)
  own_BT1 = own_BT[:, None, :, None]
  j = jnp.arange(J, dtype=jnp.int32)[None, None, None]
  forced = (j == 0) | (j == own_BT1) | (j == own_BT1 - 1)
  scores_BKTJ = jnp.where(forced, jnp.inf, scores_BKTJ)
  scores_BKTJ = jnp.where(j > own_BT1, -jnp.inf, scores_BKTJ)
  top_BKTI, chosen_BKTI = jax.lax.top_k(scores_BKTJ, min(sizes.count, J))
  chosen_BKTI = jnp.where(jnp.isneginf(top_BKTI), J, chosen_BKTI)
  chosen_BKTI = jnp.sort(pad_axis(chosen_BKTI, sizes.count, 3, J), axis=-1)
  chosen_BKTI = jnp.where(chosen_BKTI == J, -1, chosen_BKTI)
  return chosen_BKTI.transpose(0, 2, 1, 3).astype(jnp.int32)
