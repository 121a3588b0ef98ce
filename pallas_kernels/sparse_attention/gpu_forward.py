"""Attends on Hopper, one program for each query: the heads of its group are rows of the products.

TMA copies the blocks of a query's list, which may begin at any token, one ahead of their use. A
warpgroup multiplies 64 rows, of which a group may leave some unused: rows share nothing, so that
it does not matter what those hold.
"""

# A rows of keys (batch and key head), Z = A * T queries, T query positions, G heads of a group,
# I selected blocks of a query, H width of queries and keys, U width of values,
# R rows of a product, Y keys of a product
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
  filled,
  launch,
  multiply,
  swizzled,
)
from pallas_kernels.common.padding import round_up

LANES = 64
"""Columns of a tile are whole swizzles of 16-bit numbers."""
STAGES = 2


class Plan(NamedTuple):
  """Holds the sizes of the kernels; hashable."""

  T: int
  S: int
  G: int  # padded to a power of two from 8 to ROWS
  block: int
  scale: float
  interpret: Any

  @property
  def keys(self) -> int:
    """Returns Y, the keys that are read of a block."""
    return round_up(self.block, LANES)


class Lists(NamedTuple):
  """Holds the list of each query: arrays outside of a kernel, references inside."""

  start_ZI: Any  # first tokens of its blocks, ascending, then S
  count_Z: Any  # number of its blocks
  position_Z: Any


class KeyTiles(NamedTuple):
  """Holds a block of keys and values of each stage in shared memory, and its barriers."""

  k: Any  # [STAGES, Y, H]
  v: Any  # [STAGES, Y, U]
  k_copied: Any
  v_copied: Any


class Scratch(NamedTuple):
  """Holds what the forward kernel has in shared memory."""

  q_RH: Any
  q_copied: Any
  tiles: KeyTiles
  p_RY: Any
  o_RU: Any
  lse_R: Any


def call_forward(
  q_ZGH: jax.Array, k_ASH: jax.Array, v_ASU: jax.Array, lists: Lists, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [Z, G, U] and the logsumexp [Z, G]."""
  (Z, G, H), U, dtype = q_ZGH.shape, v_ASU.shape[2], q_ZGH.dtype
  tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=swizzled(dtype))
  scratch = Scratch(
    q_RH=tile((ROWS, H)),
    q_copied=plgpu.Barrier(),
    tiles=key_tiles(H, U, dtype, plan),
    p_RY=tile((ROWS, plan.keys)),
    o_RU=tile((ROWS, U)),
    lse_R=plgpu.SMEM((ROWS,), jnp.float32),
  )
  return launch(
    functools.partial(forward_kernel, plan=plan),
    plan.interpret,
    out_type=[jax.ShapeDtypeStruct((Z, G, U), dtype), jax.ShapeDtypeStruct((Z, G), jnp.float32)],
    scratch_types=[scratch],
    grid=(Z,),
    grid_names=("query",),
  )(q_ZGH, k_ASH, v_ASU, lists)


def forward_kernel(
  q_ZGH: Any,
  k_ASH: Any,
  v_ASU: Any,
  lists: Lists,
  o_ZGU: Any,
  lse_ZG: Any,
  scratch: Scratch,
  *,
  plan: Plan,
) -> None:
  """Attends with the heads of one query to the blocks of its list."""
  z, heads = jax.lax.axis_index("query"), pl.ds(0, plan.G)
  tiles, U, Y = scratch.tiles, v_ASU.shape[2], plan.keys
  count = lists.count_Z[z]
  copy = functools.partial(copy_block, k_ASH, v_ASU, lists, z, tiles=tiles, plan=plan)
  plgpu.copy_gmem_to_smem(q_ZGH.at[z], scratch.q_RH.at[heads], scratch.q_copied)
  pl.when(count > 0)(lambda: copy(jnp.int32(0)))
  plgpu.barrier_wait(scratch.q_copied)

  def add_block(entry, carry):
    max_R, mass_R, o_RU = carry
    slot = jax.lax.rem(entry, jnp.int32(STAGES))
    pl.when(entry + 1 < count)(lambda: copy(entry + 1))
    plgpu.barrier_wait(tiles.k_copied.at[slot])
    a_RY = plan.scale * multiply((scratch.q_RH, tiles.k.at[slot].transpose((1, 0))))
    a_RY = jnp.where(seen_keys(lists, z, entry, plan), a_RY, -jnp.inf)
    new_R = jnp.maximum(max_R, a_RY.max(axis=1))
    finite_R = jnp.where(new_R == -jnp.inf, 0.0, new_R)
    p_RY = jnp.exp(a_RY - along_rows(finite_R, Y))
    kept_R = jnp.exp(max_R - finite_R)
    scratch.p_RY[...] = p_RY.astype(scratch.p_RY.dtype)
    plgpu.commit_smem()
    plgpu.barrier_wait(tiles.v_copied.at[slot])
    o_RU = o_RU * along_rows(kept_R, U) + multiply((scratch.p_RY, tiles.v.at[slot]))
    return new_R, mass_R * kept_R + p_RY.sum(axis=1), o_RU

  start = filled((ROWS,), -jnp.inf), filled((ROWS,), 0.0), filled((ROWS, U), 0.0)
  max_R, mass_R, o_RU = jax.lax.fori_loop(0, count, add_block, start)
  mass_R = jnp.where(mass_R == 0, 1.0, mass_R)  # of a query that sees nothing
  scratch.o_RU[...] = (o_RU / along_rows(mass_R, U)).astype(scratch.o_RU.dtype)
  scratch.lse_R[...] = max_R + jnp.log(mass_R)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(scratch.o_RU.at[heads], o_ZGU.at[z])
  plgpu.copy_smem_to_gmem(scratch.lse_R.at[heads], lse_ZG.at[z])
  plgpu.wait_smem_to_gmem(0)


def key_tiles(H: int, U: int, dtype: Any, plan: Plan) -> KeyTiles:
  """Returns what holds the blocks that a program reads."""
  tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=swizzled(dtype))
  return KeyTiles(
    k=tile((STAGES, plan.keys, H)),
    v=tile((STAGES, plan.keys, U)),
    k_copied=plgpu.Barrier(num_barriers=STAGES),
    v_copied=plgpu.Barrier(num_barriers=STAGES),
  )


def copy_block(
  k_ASH: Any, v_ASU: Any, lists: Lists, z: Any, entry: Any, *, tiles: KeyTiles, plan: Plan
) -> None:
  """Begins to copy the block of an entry of a query's list."""
  a, slot = jax.lax.div(z, jnp.int32(plan.T)), jax.lax.rem(entry, jnp.int32(STAGES))
  rows = pl.ds(lists.start_ZI[z, entry], plan.keys)
  plgpu.copy_gmem_to_smem(k_ASH.at[a, rows], tiles.k.at[slot], tiles.k_copied.at[slot])
  plgpu.copy_gmem_to_smem(v_ASU.at[a, rows], tiles.v.at[slot], tiles.v_copied.at[slot])


def seen_keys(lists: Lists, z: Any, entry: Any, plan: Plan) -> jax.Array:
  """Returns bool [R, Y]: whether the query sees the tokens that were read of a block."""
  start = lists.start_ZI[z, entry]
  end = jnp.minimum(start + plan.block, lists.position_Z[z] + 1)
  return start + counted((ROWS, plan.keys), 1) < end
