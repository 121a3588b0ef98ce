"""Attends with blocks of queries to the blocks of keys in their unions (TPU)."""

# T query positions, S key positions, H width of queries and keys, U width of values,
# A = B * K rows and key heads, G heads of a group, R rows of a query block, X query blocks of a
# head, Z rows of a group of query blocks, L keys that are read of a block, Y keys of a tile
from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import tpu_tiles as tiles
from pallas_kernels.sparse_attention.tpu_tiles import LOG2E, Plan


def call_forward(q_ATH, k_ASH, v_ASU, positions_AX1R, lists, plan: Plan) -> Any:
  """Returns the output [A, T * G, U] and the logsumexp [A, X, 1, R], to the base 2."""
  (A, rows, H), U = q_ATH.shape, v_ASU.shape[2]
  steps, Z = positions_AX1R.shape[1] // plan.step_blocks, plan.group_rows
  of_lanes = tiles.lanes_spec(plan)
  return pl.pallas_call(
    functools.partial(forward_kernel, plan=plan),
    grid=(A, steps),
    in_specs=[*tiles.in_specs(steps, lists, (H,), k_ASH, v_ASU, plan), of_lanes],
    out_specs=[tiles.rows_spec(U, plan), of_lanes],
    out_shape=[
      varying_struct((A, rows, U), q_ATH.dtype, q_ATH),
      varying_struct(positions_AX1R.shape, jnp.float32, q_ATH),
    ],
    scratch_shapes=[
      pltpu.VMEM((U, Z), jnp.float32),
      pltpu.VMEM((plan.stacked * plan.read, Z), jnp.float32),
    ],
    compiler_params=tiles.compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_forward",
  )(lists, q_ATH, k_ASH, v_ASU, positions_AX1R)


def forward_kernel(lists, q, k, v, positions, o, lse, sum_UZ, a_YZ, *, plan: Plan):
  """Attends with the query blocks of a step, a group at a time."""

  def multiply(member, tile):
    """Makes the logits of a tile."""
    k_YH = tiles.read_tile(k, tiles.entries_of(lists, member.number, tile, plan), plan)
    a_YZ[:, member.columns] = tiles.dot(k_YH, q[0, member.rows], 1, 1)

  def attend(members):
    attend_with_group(members, multiply, lists, v, positions, o, lse, sum_UZ, a_YZ, plan)

  tiles.over_groups(lists, plan, multiply, attend)


def attend_with_group(members, multiply, lists, v, positions, o, lse, sum_UZ, a_YZ, plan: Plan):
  """Attends with the query blocks of a group, each to the blocks of its own union."""
  factor = plan.scale * LOG2E
  sum_UZ[...] = jnp.zeros_like(sum_UZ)

  def add_tile(tile, carry, *, masked):
    sums = []
    for member, (max_1R, mass_1R) in zip(members, carry):
      columns = member.columns
      entries = tiles.entries_of(lists, member.number, tile, plan)
      v_YU = tiles.read_tile(v, entries, plan)
      new_1R, chosen = max_1R, []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        if masked:
          seen_LR = tiles.seen_tokens(entry.start, positions[0, member.number], plan)
          a_YZ[at, columns] = jnp.where(seen_LR, a_YZ[at, columns], -jnp.inf)
        chosen.append(tiles.selected_rows(entry.words, plan))
        top_1R = factor * jnp.max(a_YZ[at, columns], axis=0, keepdims=True)
        new_1R = jnp.maximum(new_1R, jnp.where(chosen[i], top_1R, -jnp.inf))
      finite_1R = jnp.where(new_1R == -jnp.inf, 0.0, new_1R)
      exponentials = []
      for i, chosen_1R in enumerate(chosen):
        a_LR = factor * a_YZ[pl.ds(i * plan.read, plan.read), columns]
        exponentials.append(jnp.exp2(a_LR - jnp.where(chosen_1R, finite_1R, jnp.inf)))
      e_YR = jnp.concatenate(exponentials, axis=0)
      # the next tile's logits, which the MXU makes while this one's exponentials are made
      multiply(member, tile + 1)
      kept_1R = jnp.exp2(max_1R - finite_1R)
      mass_1R = mass_1R * kept_1R + jnp.sum(e_YR, axis=0, keepdims=True)
      o_UR = tiles.dot(v_YU, e_YR.astype(v_YU.dtype), 0, 0)
      sum_UZ[:, columns] = sum_UZ[:, columns] * kept_1R + o_UR
      sums.append((new_1R, mass_1R))
    return tuple(sums)

  zero_1R = jnp.zeros((1, plan.rows), jnp.float32)
  start = tuple((zero_1R - jnp.inf, zero_1R) for _ in members)
  sums = tiles.over_tiles(lists, members, plan, add_tile, start)
  for member, (max_1R, mass_1R) in zip(members, sums):
    blind_1R = mass_1R == 0
    mass_1R = jnp.where(blind_1R, 1.0, mass_1R)
    o[0, member.rows] = (sum_UZ[:, member.columns] / mass_1R).T.astype(o.dtype)
    lse[0, member.number] = jnp.where(blind_1R, -jnp.inf, max_1R + jnp.log2(mass_1R))
