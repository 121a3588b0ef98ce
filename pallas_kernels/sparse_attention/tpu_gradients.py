"""Sums the gradients of blocks of queries, keys and values over the unions (TPU).

A block of keys is in the unions of many query blocks. Where the sums of all keys of a head fit in
VMEM beside the keys, they stay there while the grid goes over the query blocks, in order, and the
logits are made once for all three gradients. Where they do not, only the queries' gradient is made
here, and `tpu_keys_gradient.py` makes the others.
"""

# T query positions, S key positions, H width of queries and keys, U width of values,
# A = B * K rows and key heads, G heads of a group, R rows of a query block, X query blocks of a
# head, Z rows of a group of query blocks, L keys that are read of a block, Y keys of a tile
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import tpu_tiles as tiles
from pallas_kernels.sparse_attention.tpu_tiles import LOG2E, Plan


def call_gradients(
  q_ATH, do_ATU, k_ASH, v_ASU, positions_AX1R, lse_AX1R, mean_AX1R, lists, plan: Plan
) -> list[jax.Array]:
  """Returns dq [A, T * G, H] and, where `plan.together`, dk and dv in float32.

  lse is to the base 2; mean is what each row's dp exceeds on average.
  """
  (A, _, H), U = q_ATH.shape, v_ASU.shape[2]
  steps, Z = positions_AX1R.shape[1] // plan.step_blocks, plan.group_rows
  of_keys = (k_ASH, v_ASU) if plan.together else ()
  tile = pltpu.VMEM((plan.stacked * plan.read, Z), jnp.float32)
  return pl.pallas_call(
    functools.partial(gradients_kernel, plan=plan),
    grid=(A, steps),
    in_specs=[
      *tiles.in_specs(steps, lists, (H, U), k_ASH, v_ASU, plan),
      *(tiles.lanes_spec(plan),) * 3,
    ],
    out_specs=[tiles.rows_spec(H, plan), *map(tiles.whole_spec, of_keys)],
    out_shape=[
      varying_struct(q_ATH.shape, q_ATH.dtype, q_ATH),
      *(varying_struct(x.shape, jnp.float32, q_ATH) for x in of_keys),
    ],
    scratch_shapes=[pltpu.VMEM((H, Z), jnp.float32), tile, tile],
    compiler_params=tiles.compiler_params(plan, "arbitrary" if plan.together else "parallel"),
    interpret=plan.interpret,
    name="nsa_selected_gradients" if plan.together else "nsa_selected_dq",
  )(lists, q_ATH, do_ATU, k_ASH, v_ASU, positions_AX1R, lse_AX1R, mean_AX1R)


def gradients_kernel(lists, q, do, k, v, positions, lse, mean, dq, *refs, plan: Plan):
  """Sums the gradients of a step's query blocks and of their keys, a group at a time."""
  *of_keys, sum_HZ, a_YZ, dp_YZ = refs

  @pl.when(pl.program_id(1) == 0)
  def _():
    for sums in of_keys:

      def clear(i, _, sums=sums):
        sums[0, pl.ds(i * tiles.ALIGN, tiles.ALIGN)] = jnp.zeros((tiles.ALIGN, sums.shape[2]))
        return 0

      jax.lax.fori_loop(0, sums.shape[1] // tiles.ALIGN, clear, 0)

  def multiply(member, tile):
    """Makes logits and the gradients of probabilities of a tile."""
    entries, columns = tiles.entries_of(lists, member.number, tile, plan), member.columns
    k_YH, v_YU = (tiles.read_tile(ref, entries, plan) for ref in (k, v))
    a_YZ[:, columns] = tiles.dot(k_YH, q[0, member.rows], 1, 1)
    dp_YZ[:, columns] = tiles.dot(v_YU, do[0, member.rows], 1, 1)

  def add(members):
    rows, sums = (q, do, positions, lse, mean), (*of_keys, sum_HZ)
    add_group(members, multiply, lists, rows, k, dq, sums, a_YZ, dp_YZ, plan)

  tiles.over_groups(lists, plan, multiply, add)


def add_group(members, multiply, lists, rows, k, dq, sums, a_YZ, dp_YZ, plan: Plan) -> None:
  """Makes a group's dq, and adds what it gives to the gradients of keys and values."""
  q, do, positions, lse, mean = rows
  *of_keys, sum_HZ = sums
  factor = plan.scale * LOG2E
  sum_HZ[...] = jnp.zeros_like(sum_HZ)

  def add_tile(tile, carry, *, masked):
    for member in members:
      columns, number = member.columns, member.number
      entries = tiles.entries_of(lists, number, tile, plan)
      probabilities, gradients = [], []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        chosen_1R = tiles.selected_rows(entry.words, plan)
        lse_1R = jnp.where(chosen_1R, lse[0, number], jnp.inf)
        # that of a query which sees NaN is NaN, and must not reach keys that it does not see
        mean_1R = jnp.where(chosen_1R, mean[0, number], 0.0)
        p_LR = jnp.exp2(factor * a_YZ[at, columns] - lse_1R)
        da_LR = p_LR * (dp_YZ[at, columns] - mean_1R)
        if masked:
          seen_LR = tiles.seen_tokens(entry.start, positions[0, number], plan)
          p_LR, da_LR = jnp.where(seen_LR, p_LR, 0.0), jnp.where(seen_LR, da_LR, 0.0)
        probabilities.append(p_LR)
        gradients.append(da_LR)
      multiply(member, tile + 1)  # while this tile's da is made
      da_YR = jnp.concatenate(gradients, axis=0).astype(k.dtype)
      sum_HZ[:, columns] += tiles.dot(tiles.read_tile(k, entries, plan), da_YR, 0, 0)
      if of_keys:
        p_YR = jnp.concatenate(probabilities, axis=0).astype(k.dtype)
        pairs = (da_YR, q), (p_YR, do)
        for ref, (weights_YR, x) in zip(of_keys, pairs):
          added_YH = tiles.dot(weights_YR, x[0, member.rows], 1, 0)
          for i, entry in enumerate(entries):
            at = pl.ds(tiles.read_from(entry.start, plan), plan.read)
            ref[0, at] += added_YH[i * plan.read : (i + 1) * plan.read]
    return carry

  tiles.over_tiles(lists, members, plan, add_tile, 0)
  for member in members:
    dq[0, member.rows] = (plan.scale * sum_HZ[:, member.columns]).T.astype(dq.dtype)
