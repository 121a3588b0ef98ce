"""Sums the gradient of blocks of keys and values over the query blocks that selected them (TPU).

What a block of keys needs of its query blocks is copied from HBM, a group of query blocks at a
time, ahead of its use. A group is multiplied as one, so that its sums are made in the MXU.
"""

# T query positions, H width of queries and keys, U width of values, A = B * K rows and key heads,
# G heads of a group, R rows of a query block, X query blocks, J blocks of keys, L keys of a block,
# Z rows of a group of query blocks
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import tpu_tiles as tiles
from pallas_kernels.sparse_attention import unions
from pallas_kernels.sparse_attention.tpu_tiles import LOG2E, Plan


class Copies(NamedTuple):
  """Holds two sets of buffers for what is copied of a group, and their semaphores."""

  q: Any  # [2, Z, H]
  do: Any
  rows: Any  # [2, 3, Z]: positions as floats, lse, mean
  done: Any


class Group(NamedTuple):
  """Describes the query blocks of a group, as scalars of a kernel."""

  starts: list[Any]  # of the entries in the unions, which name a block of keys
  words: list[tuple[Any, ...]]  # 0 past the end of the list


def call_keys_gradient(
  q_ATH, do_ATU, k_ASH, v_ASU, positions_AX1R, lse_AX1R, mean_AX1R, inverse, plan: Plan
) -> Any:
  """Returns dk [A, J * block, H] and dv [A, J * block, U]; lse and mean as for the queries."""
  (A, _, H), U = q_ATH.shape, v_ASU.shape[2]
  X, R, J, block = positions_AX1R.shape[1], plan.rows, inverse.first_AJ.shape[1], plan.block
  # float32 holds positions exactly up to 2^24
  of_rows = (positions_AX1R.astype(jnp.float32), lse_AX1R, mean_AX1R)
  k_block = pl.BlockSpec((1, block, H), lambda a, j, *_: (a, j, 0))
  v_block = pl.BlockSpec((1, block, U), lambda a, j, *_: (a, j, 0))
  dtype, Z = q_ATH.dtype, plan.group_rows
  return pl.pallas_call(
    functools.partial(keys_gradient_kernel, X=X, plan=plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(A, J),
      in_specs=[*(pl.BlockSpec(memory_space=pl.ANY),) * 4, k_block, v_block],
      out_specs=[k_block, v_block],
      scratch_shapes=[
        pltpu.SMEM((1, 1, unions.ROW), jnp.int32),
        pltpu.SemaphoreType.DMA,
        Copies(
          q=pltpu.VMEM((2, Z, H), dtype),
          do=pltpu.VMEM((2, Z, U), dtype),
          rows=pltpu.VMEM((2, 3, Z), jnp.float32),
          done=pltpu.SemaphoreType.DMA((2, plan.abreast, 3)),
        ),
        pltpu.VMEM((block, H), jnp.float32),
        pltpu.VMEM((block, U), jnp.float32),
      ],
    ),
    out_shape=[
      varying_struct((A, J * block, H), dtype, q_ATH),
      varying_struct((A, J * block, U), dtype, q_ATH),
    ],
    compiler_params=tiles.compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_dkv",
  )(
    inverse.first_AJ.reshape(-1),
    inverse.last_AJ.reshape(-1),
    inverse.rows,
    q_ATH.reshape(A * X, R, H),
    do_ATU.reshape(A * X, R, U),
    jnp.concatenate(of_rows, axis=2).reshape(A * X, 3, R),
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
  E, R = unions.entries_of_row(plan.words), plan.rows
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
      for i in range(plan.abreast):
        entry = jnp.minimum(begin + group * plan.abreast + i, end - 1)
        block, here = a * X + field(entry, 0), pl.ds(i * R, R)
        for n, (source, target) in enumerate(
          (
            (q_hbm, copies.q.at[slot, here]),
            (do_hbm, copies.do.at[slot, here]),
            (rows_hbm, copies.rows.at[slot, :, here]),
          )
        ):
          yield pltpu.make_async_copy(source.at[block], target, copies.done.at[slot, i, n])

    groups = pl.cdiv(end - begin, plan.abreast)
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
      members = Group([], [])
      for i in range(plan.abreast):
        entry = begin + group * plan.abreast + i
        inside, entry = entry < end, jnp.minimum(entry, end - 1)
        members.starts.append(field(entry, 1))
        words = (jnp.where(inside, field(entry, 2 + w), 0) for w in range(plan.words))
        members.words.append(tuple(words))
      arrays = (copies.q[slot], copies.do[slot], copies.rows[slot])
      add_query_blocks(arrays, members, j, k, v, dk_LH, dv_LU, plan)
      return 0

    return jax.lax.fori_loop(0, groups, add_group, 0)

  jax.lax.fori_loop(first // E, pl.cdiv(last, E), add_row, 0)
  dk[0] = (plan.scale * dk_LH[...]).astype(dk.dtype)
  dv[0] = dv_LU[...].astype(dv.dtype)


def add_query_blocks(arrays, members: Group, j, k, v, dk_LH, dv_LU, plan: Plan) -> None:
  """Adds what a group of query blocks gives to the gradients of a block of keys."""
  q_ZH, do_ZU, rows_3Z = arrays
  a_LZ = (plan.scale * LOG2E) * tiles.dot(k[0], q_ZH, 1, 1)
  dp_LZ = tiles.dot(v[0], do_ZU, 1, 1)
  token_LR = j * plan.block + jax.lax.broadcasted_iota(jnp.int32, (plan.block, plan.rows), 0)
  probabilities, gradients = [], []
  for i, (start, words) in enumerate(zip(members.starts, members.words)):
    columns = slice(i * plan.rows, (i + 1) * plan.rows)
    positions_1R, lse_1R, mean_1R = (rows_3Z[n : n + 1, columns] for n in range(3))
    seen_LR = token_LR.astype(jnp.float32) <= positions_1R
    if plan.packed:
      seen_LR = seen_LR & (token_LR >= start) & (token_LR < start + plan.block)
    # a query that did not select the block may hold NaN, which must not reach the sums
    seen_LR = seen_LR & tiles.selected_rows(words, plan)
    p_LR = jnp.where(seen_LR, jnp.exp2(a_LZ[:, columns] - lse_1R), 0.0)
    probabilities.append(p_LR)
    gradients.append(jnp.where(seen_LR, p_LR * (dp_LZ[:, columns] - mean_1R), 0.0))
  p_LZ, da_LZ = (jnp.concatenate(parts, axis=1) for parts in (probabilities, gradients))
  dv_LU[...] += tiles.dot(p_LZ.astype(do_ZU.dtype), do_ZU, 1, 0)
  dk_LH[...] += tiles.dot(da_LZ.astype(q_ZH.dtype), q_ZH, 1, 0)
