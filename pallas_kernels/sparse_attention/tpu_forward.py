"""Attends with blocks of queries to the blocks of keys in their unions (TPU)."""

# T query positions, S key positions, H width of queries and keys, U width of values,
# A = B * K rows and key heads, G heads of a group, R rows of a query block, X steps of a head,
# Z = abreast * R rows of a step, L keys that are read of a block, Y keys of a tile
from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.sparse_attention import tpu_tiles as tiles
from pallas_kernels.sparse_attention.tpu_tiles import LOG2E, Plan


def call_forward(q_ATH, k_ASH, v_ASU, positions_AX1Z, lists, plan: Plan) -> Any:
  """Returns the output [A, T * G, U] and the logsumexp [A, X, 1, Z], to the base 2."""
  (A, rows, H), U = q_ATH.shape, v_ASU.shape[2]
  X, Z = positions_AX1Z.shape[1], plan.step_rows
  lane_block = pl.BlockSpec((1, 1, 1, Z), lambda a, x: (a, x, 0, 0))
  return pl.pallas_call(
    functools.partial(forward_kernel, plan=plan),
    grid=(A, X),
    in_specs=[*tiles.in_specs(X, lists, (H,), k_ASH, v_ASU, plan), lane_block],
    out_specs=[pl.BlockSpec((1, Z, U), lambda a, x: (a, x, 0)), lane_block],
    out_shape=[
      varying_struct((A, rows, U), q_ATH.dtype, q_ATH),
      varying_struct((A, X, 1, Z), jnp.float32, q_ATH),
    ],
    scratch_shapes=[
      pltpu.VMEM((U, Z), jnp.float32),
      pltpu.VMEM((plan.stacked * plan.read, Z), jnp.float32),
    ],
    compiler_params=tiles.compiler_params(plan),
    interpret=plan.interpret,
    name="nsa_selected_forward",
  )(lists, q_ATH, k_ASH, v_ASU, positions_AX1Z)


def forward_kernel(lists, q, k, v, positions, o, lse, sum_UZ, a_YZ, *, plan: Plan):
  """Attends with the query blocks of a step, each to the blocks of its own union."""
  factor = plan.scale * LOG2E
  numbers = range(plan.abreast)
  sum_UZ[...] = jnp.zeros_like(sum_UZ)

  def multiply(number, tile):
    """Makes the logits of a tile."""
    k_YH = tiles.read_tile(k, tiles.entries_of(lists, number, tile, plan), plan)
    columns = plan.columns(number)
    a_YZ[:, columns] = tiles.dot(k_YH, q[0, columns], 1, 1)

  def add_tile(tile, carry, *, masked):
    sums = []
    for number, (max_1R, mass_1R) in enumerate(carry):
      columns = plan.columns(number)
      entries = tiles.entries_of(lists, number, tile, plan)
      v_YU = tiles.read_tile(v, entries, plan)
      new_1R, chosen = max_1R, []
      for i, entry in enumerate(entries):
        at = pl.ds(i * plan.read, plan.read)
        if masked:
          seen_LR = tiles.seen_tokens(entry.start, positions[0, 0, :, columns], plan)
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
      multiply(number, tile + 1)
      kept_1R = jnp.exp2(max_1R - finite_1R)
      mass_1R = mass_1R * kept_1R + jnp.sum(e_YR, axis=0, keepdims=True)
      o_UR = tiles.dot(v_YU, e_YR.astype(v_YU.dtype), 0, 0)
      sum_UZ[:, columns] = sum_UZ[:, columns] * kept_1R + o_UR
      sums.append((new_1R, mass_1R))
    return tuple(sums)

  for number in numbers:
    multiply(number, 0)
  zero_1R = jnp.zeros((1, plan.rows), jnp.float32)
  start = tuple((zero_1R - jnp.inf, zero_1R) for _ in numbers)
  for number, (max_1R, mass_1R) in enumerate(tiles.over_tiles(lists, plan, add_tile, start)):
    columns, blind_1R = plan.columns(number), mass_1R == 0
    mass_1R = jnp.where(blind_1R, 1.0, mass_1R)
    o[0, columns] = (sum_UZ[:, columns] / mass_1R).T.astype(o.dtype)
    lse[0, 0, :, columns] = jnp.where(blind_1R, -jnp.inf, max_1R + jnp.log2(mass_1R))
