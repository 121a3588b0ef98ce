"""Sums the gradient of blocks of queries over the blocks of keys in their unions (TPU)."""

# T query positions, S key positions, H width of queries and keys, U width of values,
# A = B * K rows and key heads, G heads of a group, R rows of a query block, X steps of a head,
# Z = abreast * R rows of a step, L keys that are read of a block, Y keys of a tile
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import tpu_tiles as tiles
from pallas_kernels.sparse_attention.tpu_tiles import LOG2E, Plan


def call_queries_gradient(
  q_ATH, do_ATU, k_ASH, v_ASU, positions_AX1Z, lse_AX1Z, mean_AX1Z, lists, plan: Plan
) -> jax.Array:
  """Returns dq [A, T * G, H]; lse is in units of 2, mean what each row's dp exceeds on average."""
  (A, _, H), U = q_ATH.shape, v_ASU.shape[2]
  X, Z = positions_AX1Z.shape[1], plan.step_rows
  lane_block = pl.BlockSpec((1, 1, 1, Z), lambda a, x: (a, x, 0, 0))
  tile = pltpu.VMEM((plan.stacked * plan.read, Z), jnp.float32)
  return pl.pallas_call(
    functools.partial(queries_gradient_kernel, plan=plan),
    grid=(A, X),
    in_specs=[*tiles.in_specs(X, lists, (H, U), k_ASH, v_ASU, plan), *(lane_block,) * 3],
    out_specs=pl.BlockSpec((1, Z, H), lambda a, x: (a, x, 0)),
    out_shape=varying_struct(q_ATH.shape, q_ATH.dtype, q_ATH),
    scratch_shapes=[pltpu.VMEM((H, Z), jnp.float32), tile, tile],
    compiler_params=tiles.compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_dq",
  )(lists, q_ATH, do_ATU, k_ASH, v_ASU, positions_AX1Z, lse_AX1Z, mean_AX1Z)


def queries_gradient_kernel(
  lists, q, do, k, v, positions, lse, mean, dq, sum_HZ, a_YZ, dp_YZ, *, plan: Plan
):
  """Sums the gradients of a step's query blocks, each over the blocks of its own union."""
  factor = plan.scale * LOG2E
  sum_HZ[...] = jnp.zeros_like(sum_HZ)

  def multiply(number, tile):
    """Makes logits and the gradients of probabilities of a tile."""
    entries, columns = tiles.entries_of(lists, number, tile, plan), plan.columns(number)
    a_YZ[:, columns] = tiles.dot(tiles.read_tile(k, entries, plan), q[0, columns], 1, 1)
    dp_YZ[:, columns] = tiles.dot(tiles.read_tile(v, entries, plan), do[0, columns], 1, 1)

  def add_tile(tile, carry, *, masked):
    for number in range(plan.abreast):
      columns = plan.columns(number)
      entries, gradients = tiles.entries_of(lists, number, tile, plan), []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        a_LR = factor * a_YZ[at, columns]
        if masked:
          seen_LR = tiles.seen_tokens(entry.start, positions[0, 0, :, columns], plan)
          a_LR = jnp.where(seen_LR, a_LR, -jnp.inf)
        chosen_1R = tiles.selected_rows(entry.words, plan)
        p_LR = jnp.exp2(a_LR - jnp.where(chosen_1R, lse[0, 0, :, columns], jnp.inf))
        gradients.append(p_LR * (dp_YZ[at, columns] - mean[0, 0, :, columns]))
      multiply(number, tile + 1)  # while this tile's da is made
      da_YR = jnp.concatenate(gradients, axis=0).astype(k.dtype)
      sum_HZ[:, columns] += tiles.dot(tiles.read_tile(k, entries, plan), da_YR, 0, 0)
    return carry

  for number in range(plan.abreast):
    multiply(number, 0)
  tiles.over_tiles(lists, plan, add_tile, 0)
  for number in range(plan.abreast):
    columns = plan.columns(number)
    dq[0, columns] = (plan.scale * sum_HZ[:, columns]).T.astype(dq.dtype)
