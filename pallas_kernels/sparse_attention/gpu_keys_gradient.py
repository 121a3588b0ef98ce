"""Makes the gradients of keys and values of selected blocks on Hopper, from the logsumexp.

A program has 64 keys and goes through the queries that selected any of them, by the inverse of the
lists; as many at a time as fill the rows of a product, copied one step ahead of their use.
"""

# A rows of keys (batch and key head), Z = A * T queries, T query positions, S key positions,
# G heads of a group, I selected blocks of a query, P = Z * I pairs of a query and a block,
# J tiles of keys, M = A * J, H width of queries and keys, U width of values, R rows of a product,
# Y keys of a product
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
  counted,
  launch,
  load_rows,
  swizzled,
)
from pallas_kernels.common.padding import pad_axis
from pallas_kernels.sparse_attention import pairs
from pallas_kernels.sparse_attention.gpu_forward import LANES, STAGES, Lists, Plan
from pallas_kernels.sparse_attention.gpu_queries_gradient import (
  QueryTiles,
  RowValues,
  copy_query,
  logit_gradients,
  probabilities,
  query_tiles,
)


class Inverse(NamedTuple):
  """Holds all pairs of a query and a block, by the block's first token, for each tile of keys."""

  row_P: Any  # query, z
  start_P: Any  # first token of the block
  first_M: Any  # first pair whose block overlaps the tile j of a, with M = A * J
  last_M: Any  # and the one after the last


class KeyScratch(NamedTuple):
  """Holds what the keys' kernel has in shared memory."""

  k_YH: Any
  v_YU: Any
  copied: Any
  queries: QueryTiles
  p_RY: Any
  da_RY: Any


def invert(lists: Lists, A: int, plan: Plan) -> Inverse:
  """Returns the pairs of each tile of keys; the order of pairs of one block is the queries'."""
  S = plan.S
  place_P, row_P = pairs.sort_pairs(lists.start_ZI, plan.T, S)
  tile_J = jnp.arange(0, S, LANES, dtype=jnp.int32)
  place_A1 = S * jnp.arange(A, dtype=jnp.int32)[:, None]
  first_AJ = place_A1 + jnp.maximum(tile_J - (plan.block - 1), 0)[None]
  last_AJ = place_A1 + jnp.minimum(tile_J + LANES, S)[None]
  first_M, last_M = (
    jnp.searchsorted(place_P, at_AJ.reshape(-1)).astype(jnp.int32) for at_AJ in (first_AJ, last_AJ)
  )
  return Inverse(row_P, place_P % S, first_M, last_M)


def call_keys_gradient(
  q_ZGH: jax.Array,
  do_ZGU: jax.Array,
  k_ASH: jax.Array,
  v_ASU: jax.Array,
  values: RowValues,
  lists: Lists,
  plan: Plan,
) -> tuple[jax.Array, jax.Array]:
  """Returns dk and dv, of the shapes of the keys and values."""
  (A, padded, H), U, dtype = k_ASH.shape, v_ASU.shape[2], q_ZGH.dtype
  J, row_R = -(-plan.S // LANES), jnp.arange(ROWS, dtype=jnp.int32)
  tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=swizzled(dtype))
  scratch = KeyScratch(
    k_YH=tile((LANES, H)),
    v_YU=tile((LANES, U)),
    copied=plgpu.Barrier(num_arrivals=2),
    queries=query_tiles(H, U, dtype, (STAGES,), ROWS // plan.G),
    p_RY=tile((ROWS, LANES)),
    da_RY=tile((ROWS, LANES)),
  )
  dk_ASH, dv_ASU = launch(
    functools.partial(keys_gradient_kernel, J=J, plan=plan),
    plan.interpret,
    out_type=[jax.ShapeDtypeStruct((A, J * LANES, width), dtype) for width in (H, U)],
    scratch_types=[scratch],
    grid=(A * J,),
    grid_names=("tile",),
  )(q_ZGH, do_ZGU, k_ASH, v_ASU, values, lists.position_Z, row_R, invert(lists, A, plan))
  return pad_axis(dk_ASH, padded, 1), pad_axis(dv_ASU, padded, 1)


def keys_gradient_kernel(
  q_ZGH: Any,
  do_ZGU: Any,
  k_ASH: Any,
  v_ASU: Any,
  values: RowValues,
  position_Z: Any,
  row_R: Any,
  inverse: Inverse,
  dk_ASH: Any,
  dv_ASU: Any,
  scratch: KeyScratch,
  *,
  J: int,
  plan: Plan,
) -> None:
  """Sums the gradients of one tile of keys over the queries that selected any of them."""
  m, stacked = jax.lax.axis_index("tile"), ROWS // plan.G
  a, token = jax.lax.div(m, jnp.int32(J)), jax.lax.rem(m, jnp.int32(J)) * LANES
  first, last = inverse.first_M[m], inverse.last_M[m]
  steps = jax.lax.div(last - first + (stacked - 1), jnp.int32(stacked))
  keys = pl.ds(token, LANES)
  plgpu.copy_gmem_to_smem(k_ASH.at[a, keys], scratch.k_YH, scratch.copied)
  plgpu.copy_gmem_to_smem(v_ASU.at[a, keys], scratch.v_YU, scratch.copied)

  def of_stage(step: Any) -> QueryTiles:
    slot = jax.lax.rem(step, jnp.int32(STAGES))
    return QueryTiles(*(ref.at[slot] for ref in scratch.queries))

  def pair_of(step: Any, i: int) -> tuple[Any, Any]:
    """Returns the i-th pair of a step, and whether there is one; else the last pair."""
    pair = first + step * stacked + i
    return jnp.minimum(pair, last - 1), pair < last

  def copy(step: Any) -> None:
    tiles = of_stage(step)
    for i in range(stacked):
      z = inverse.row_P[pair_of(step, i)[0]]
      copy_query(q_ZGH, do_ZGU, z, tiles, pl.ds(i * plan.G, plan.G))

  def values_of(step: Any) -> tuple[RowValues, jax.Array]:
    """Returns numbers of the rows of a step, and bool [R, Y]: whether a row sees a token."""
    index_R = load_rows(row_R)
    lse_R, mean_R, start_R, end_R = (jnp.zeros(ROWS, dtype) for dtype in 2 * "f" + 2 * "i")
    for i in range(stacked):
      pair, exists = pair_of(step, i)
      z, start, of_query = inverse.row_P[pair], inverse.start_P[pair], index_R >= i * plan.G
      end = jnp.where(exists, jnp.minimum(start + plan.block, position_Z[z] + 1), 0)
      lse_R = jnp.where(of_query, load_rows(values.lse.at[z]), lse_R)
      mean_R = jnp.where(of_query, load_rows(values.mean.at[z]), mean_R)
      start_R, end_R = jnp.where(of_query, start, start_R), jnp.where(of_query, end, end_R)
    token_RY = token + counted((ROWS, LANES), 1)
    seen_RY = (token_RY >= along_rows(start_R, LANES)) & (token_RY < along_rows(end_R, LANES))
    return RowValues(lse_R, mean_R), seen_RY

  def sum_queries(dk_YH: Any, dv_YU: Any) -> tuple[jax.Array, jax.Array]:
    def add_queries(step, carry):
      pl.when(step + 1 < steps)(lambda: copy(step + 1))
      tiles, (rows, seen_RY) = of_stage(step), values_of(step)
      plgpu.barrier_wait(tiles.copied)
      p_RY = probabilities(tiles.q_RH, scratch.k_YH, rows.lse, seen_RY, plan)
      da_RY = logit_gradients(p_RY, tiles.do_RU, scratch.v_YU, rows.mean, seen_RY)
      scratch.p_RY[...] = p_RY.astype(scratch.p_RY.dtype)
      scratch.da_RY[...] = da_RY.astype(scratch.da_RY.dtype)
      plgpu.commit_smem()
      plgpu.wgmma(dv_YU, scratch.p_RY.transpose((1, 0)), tiles.do_RU)
      plgpu.wgmma(dk_YH, scratch.da_RY.transpose((1, 0)), tiles.q_RH)
      plgpu.wgmma_wait(0)
      return carry

    jax.lax.fori_loop(0, steps, add_queries, 0)
    return dk_YH[...], dv_YU[...]

  pl.when(steps > 0)(lambda: copy(jnp.int32(0)))
  plgpu.barrier_wait(scratch.copied)
  accumulators = (plgpu.ACC((LANES, ref.shape[2]), jnp.float32) for ref in (k_ASH, v_ASU))
  dk_YH, dv_YU = pl.run_scoped(sum_queries, *accumulators)
  scratch.k_YH[...] = (plan.scale * dk_YH).astype(scratch.k_YH.dtype)
  scratch.v_YU[...] = dv_YU.astype(scratch.v_YU.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(scratch.k_YH, dk_ASH.at[a, keys])
  plgpu.copy_smem_to_gmem(scratch.v_YU, dv_ASU.at[a, keys])
  plgpu.wait_smem_to_gmem(0)
