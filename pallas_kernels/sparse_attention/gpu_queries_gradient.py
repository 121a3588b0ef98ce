"""Makes the gradient of queries that attend to selected blocks on Hopper, from the logsumexp.

A program goes through a query's list as in the forward kernel.
"""

# A rows of keys (batch and key head), Z = A * T queries, G heads of a group, H width of queries and
# keys, U width of values, R rows of a product, Y keys of a product
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import (
  ROWS,
  along_rows,
  launch,
  load_rows,
  multiply,
  swizzled,
)
from pallas_kernels.sparse_attention.gpu_forward import (
  STAGES,
  KeyTiles,
  Lists,
  Plan,
  copy_block,
  key_tiles,
  seen_keys,
)


class QueryTiles(NamedTuple):
  """Holds rows of queries in shared memory; with a leading [STAGES] where they come one by one."""

  q_RH: Any
  do_RU: Any
  copied: Any


class RowValues(NamedTuple):
  """Holds numbers of queries' rows: [Z, R] in global memory, for each query all R, or [R]."""

  lse: Any
  mean: Any


def query_tiles(H: int, U: int, dtype: Any, stages: tuple[int, ...], copies: int) -> QueryTiles:
  """Returns what holds rows of queries, each made of some copies."""
  tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=swizzled(dtype))
  return QueryTiles(
    q_RH=tile((*stages, ROWS, H)),
    do_RU=tile((*stages, ROWS, U)),
    copied=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=max((1, *stages))),
  )


def copy_query(q_ZGH: Any, do_ZGU: Any, z: Any, tiles: QueryTiles, rows: Any) -> None:
  """Begins to copy a query's rows to some rows of the tiles."""
  plgpu.copy_gmem_to_smem(q_ZGH.at[z], tiles.q_RH.at[rows], tiles.copied)
  plgpu.copy_gmem_to_smem(do_ZGU.at[z], tiles.do_RU.at[rows], tiles.copied)


def probabilities(
  q_RH: Any, k_YH: Any, lse_R: jax.Array, seen_RY: jax.Array, plan: Plan
) -> jax.Array:
  """Returns the probabilities of the keys of a tile, 0 for those that are not seen."""
  a_RY = plan.scale * multiply((q_RH, k_YH.transpose((1, 0))))
  p_RY = jnp.exp(a_RY - along_rows(lse_R, k_YH.shape[0]))
  return jnp.where(seen_RY, p_RY, 0.0)


def logit_gradients(
  p_RY: jax.Array, do_RU: Any, v_YU: Any, mean_R: jax.Array, seen_RY: jax.Array
) -> jax.Array:
  """Returns the gradients of the logits."""
  dp_RY = multiply((do_RU, v_YU.transpose((1, 0))))
  da_RY = p_RY * (dp_RY - along_rows(mean_R, p_RY.shape[1]))
  return jnp.where(seen_RY, da_RY, 0.0)


class QueryScratch(NamedTuple):
  """Holds what the queries' kernel has in shared memory."""

  query: QueryTiles
  tiles: KeyTiles
  da_RY: Any


def call_queries_gradient(
  q_ZGH: jax.Array,
  do_ZGU: jax.Array,
  k_ASH: jax.Array,
  v_ASU: jax.Array,
  values: RowValues,
  lists: Lists,
  plan: Plan,
) -> jax.Array:
  """Returns dq [Z, G, H]."""
  (Z, _, H), U, dtype = q_ZGH.shape, v_ASU.shape[2], q_ZGH.dtype
  scratch = QueryScratch(
    query=query_tiles(H, U, dtype, (), 1),
    tiles=key_tiles(H, U, dtype, plan),
    da_RY=plgpu.SMEM((ROWS, plan.keys), dtype, transforms=swizzled(dtype)),
  )
  return launch(
    functools.partial(queries_gradient_kernel, plan=plan),
    plan.interpret,
    out_type=jax.ShapeDtypeStruct(q_ZGH.shape, dtype),
    scratch_types=[scratch],
    grid=(Z,),
    grid_names=("query",),
  )(q_ZGH, do_ZGU, k_ASH, v_ASU, values, lists)


def queries_gradient_kernel(
  q_ZGH: Any,
  do_ZGU: Any,
  k_ASH: Any,
  v_ASU: Any,
  values: RowValues,
  lists: Lists,
  dq_ZGH: Any,
  scratch: QueryScratch,
  *,
  plan: Plan,
) -> None:
  """Sums the gradient of one query over the blocks of its list."""
  z, heads = jax.lax.axis_index("query"), pl.ds(0, plan.G)
  query, tiles = scratch.query, scratch.tiles
  count = lists.count_Z[z]
  copy = functools.partial(copy_block, k_ASH, v_ASU, lists, z, tiles=tiles, plan=plan)
  copy_query(q_ZGH, do_ZGU, z, query, heads)
  lse_R, mean_R = load_rows(values.lse.at[z]), load_rows(values.mean.at[z])
  pl.when(count > 0)(lambda: copy(jnp.int32(0)))
  plgpu.barrier_wait(query.copied)

  def sum_blocks(acc_RH: Any) -> jax.Array:
    def add_block(entry, carry):
      slot = jax.lax.rem(entry, jnp.int32(STAGES))
      pl.when(entry + 1 < count)(lambda: copy(entry + 1))
      k_YH, v_YU = tiles.k.at[slot], tiles.v.at[slot]
      seen_RY = seen_keys(lists, z, entry, plan)
      plgpu.barrier_wait(tiles.k_copied.at[slot])
      p_RY = probabilities(query.q_RH, k_YH, lse_R, seen_RY, plan)
      plgpu.barrier_wait(tiles.v_copied.at[slot])
      da_RY = logit_gradients(p_RY, query.do_RU, v_YU, mean_R, seen_RY)
      scratch.da_RY[...] = da_RY.astype(scratch.da_RY.dtype)
      plgpu.commit_smem()
      plgpu.wgmma(acc_RH, scratch.da_RY, k_YH)
      plgpu.wgmma_wait(0)
      return carry

    jax.lax.fori_loop(0, count, add_block, 0)
    return acc_RH[...]

  dq_RH = plan.scale * pl.run_scoped(sum_blocks, plgpu.ACC((ROWS, k_ASH.shape[2]), jnp.float32))
  query.q_RH[...] = dq_RH.astype(query.q_RH.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query.q_RH.at[heads], dq_ZGH.at[z])
  plgpu.wait_smem_to_gmem(0)
