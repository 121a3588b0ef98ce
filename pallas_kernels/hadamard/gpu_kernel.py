"""Holds the body of the Hopper kernel: one warpgroup rotates a tile of chunks and quantises it."""

# C chunks (of a tile: T, in 64 rows of registers), S lanes of a chunk
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import (
  ROWS,
  WARPGROUPS,
  along_rows,
  counted,
  load,
  load_columns,
)
from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation

LANES = 128


class Operands(NamedTuple):
  """Holds what a kernel reads; None for what is not used."""

  x_CS: Any
  right_SS: Any
  same_SS: Any | None
  """1 where two lanes of a chunk belong to the same rotation, for rotations below a chunk"""
  left_CC: Any | None
  """blocks of H_A, for rotations above a chunk"""
  signs_CS: Any | None
  """of a row's chunks and as many after them as a tile has"""
  out_signs_CS: Any | None
  noise_CS: Any | None


class Outputs(NamedTuple):
  """Holds the rotated chunks, or their codes, scales [C] and mask; or shared memory for them."""

  y_CS: Any = None
  codes_CS: Any = None
  scales_C: Any = None
  mask_CS: Any = None


class Matrices(NamedTuple):
  """Holds the matrices in shared memory."""

  right_SS: Any
  same_SS: Any | None
  left_CC: Any | None


class Scratch(NamedTuple):
  """Holds the shared memory of each warpgroup, and barriers of its copies."""

  x_CS: Any
  part_CS: Any
  vector_C: Any
  copied: Any


class Plan(NamedTuple):
  """Holds what is static in a kernel."""

  rotation: Rotation
  quantizer: Quantizer | None
  tile: int
  steps: int
  parts: int
  interpreted: bool

  @property
  def chunks(self) -> int:
    """Returns how many chunks a row has."""
    return self.rotation.width // LANES


def rotate_tiles(
  operands: Operands,
  out: Outputs,
  out_shared: Outputs,
  matrices: Matrices,
  scratch: Scratch,
  copied: Any,
  *,
  plan: Plan,
) -> None:
  """Copies the matrices, then rotates the tiles of each warpgroup."""
  group = jax.lax.axis_index("wg")
  first = (jax.lax.axis_index("tiles") * WARPGROUPS + group) * plan.steps

  @pl.when(group == 0)
  def copy_matrices() -> None:
    for source, shared in zip(operands[1:4], matrices):
      if source is not None:
        plgpu.copy_gmem_to_smem(source, shared, copied)

  plgpu.barrier_wait(copied)
  own = Scratch(*(memory.at[group] for memory in scratch))
  mine = jax.tree.map(lambda memory: memory.at[group], out_shared)

  def of_tile(step: jax.Array, _: None) -> None:
    start = (first + step) * plan.tile
    rotate_tile(operands, out, mine, matrices, own, start, plan)

  jax.lax.fori_loop(0, plan.steps, of_tile, None)


def rotate_tile(
  operands: Operands,
  out: Outputs,
  shared: Outputs,
  matrices: Matrices,
  own: Scratch,
  start: jax.Array,
  plan: Plan,
) -> None:
  """Rotates the chunks from `start` on, and writes them or their codes."""
  T = plan.tile
  plgpu.copy_gmem_to_smem(operands.x_CS.at[pl.ds(start, T)], own.x_CS.at[pl.ds(0, T)], own.copied)
  plgpu.barrier_wait(own.copied)
  x_CS = load(own.x_CS, plgpu.Layout.WGMMA).astype(jnp.float32)
  offset = jax.lax.rem(start, jnp.int32(plan.chunks))
  if T < ROWS:  # the rest of shared memory holds anything
    x_CS = jnp.where(counted((ROWS, LANES), 0) < T, x_CS, 0.0)
  if operands.signs_CS is not None:
    x_CS = x_CS * load(operands.signs_CS.at[pl.ds(offset, ROWS)], plgpu.Layout.WGMMA)
  y_CS = rotate_chunks(x_CS, matrices, own, plan) * (1 / math.sqrt(plan.rotation.n))
  if operands.out_signs_CS is not None:
    y_CS = y_CS * load(operands.out_signs_CS.at[pl.ds(offset, ROWS)], plgpu.Layout.WGMMA)
  if plan.quantizer is None:
    shared.y_CS[...] = y_CS.astype(shared.y_CS.dtype)
  else:
    noise = operands.noise_CS
    noise_CS = None if noise is None else load(noise.at[pl.ds(start, ROWS)], plgpu.Layout.WGMMA)
    quantize_chunks(y_CS, noise_CS, shared, own, plan.quantizer)
  plgpu.commit_smem()
  for source, target in zip(shared, out):
    if source is not None:
      plgpu.copy_smem_to_gmem(source.at[pl.ds(0, T)], target.at[pl.ds(start, T)])
  plgpu.wait_smem_to_gmem(0)


def rotate_chunks(x_CS: jax.Array, matrices: Matrices, own: Scratch, plan: Plan) -> jax.Array:
  """Returns the product with both matrices. What is not finite makes its rotation NaN alone."""
  A = plan.rotation.n // LANES

  def by_right(x_CS: jax.Array, matrix: Any, parts: int) -> jax.Array:
    return exact_product(lambda acc: plgpu.wgmma(acc, own.part_CS, matrix), x_CS, own, parts)

  if A == 1:  # a chunk is a rotation, and a row of a product
    return by_right(x_CS, matrices.right_SS, plan.parts)
  finite_CS = x_CS - x_CS == 0
  bad_CS = jnp.where(finite_CS, 0.0, 1.0)
  y_CS = by_right(jnp.where(finite_CS, x_CS, 0.0), matrices.right_SS, plan.parts)
  if A == 0:
    touched_CS = by_right(bad_CS, matrices.same_SS, 1)
  else:
    left = matrices.left_CC
    y_CS = exact_product(lambda acc: plgpu.wgmma(acc, left, own.part_CS), y_CS, own, 3)
    touched_C = over_neighbours(bad_CS.max(axis=1), A, own, lambda all_CC: all_CC.max(axis=1))
    touched_CS = along_rows(touched_C, LANES)
  return jnp.where(touched_CS > 0, jnp.nan, y_CS)


def exact_product(
  multiply: Callable[[Any], None], x_CS: jax.Array, own: Scratch, parts: int
) -> jax.Array:
  """Multiplies by +-1 what `parts` numbers in bfloat16 hold exactly; adds in float32."""

  def of_parts(acc: Any) -> jax.Array:
    rest_CS = x_CS
    for part in range(parts):
      part_CS = rest_CS.astype(jnp.bfloat16)
      own.part_CS[...] = part_CS
      plgpu.commit_smem()
      multiply(acc)
      if part + 1 < parts:
        rest_CS = rest_CS - part_CS.astype(jnp.float32)
        plgpu.wgmma_wait(0)
    return acc[...]

  return pl.run_scoped(of_parts, plgpu.ACC((ROWS, LANES), jnp.float32))


def over_neighbours(
  value_C: jax.Array, count: int, own: Scratch, reduce: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Reduces the numbers of each `count` neighbouring chunks, none negative, through shared memory.

  `reduce` sees them along the columns, with 0 in place of those of other chunks.
  """
  own.vector_C[...] = value_C
  plgpu.commit_smem()
  shape = (ROWS, ROWS)
  all_CC = jax.lax.broadcast_in_dim(load_columns(own.vector_C), shape, [1])
  size = jnp.full(shape, count, jnp.int32)
  neighbours = jax.lax.div(counted(shape, 0), size) == jax.lax.div(counted(shape, 1), size)
  return reduce(jnp.where(neighbours, all_CC, 0.0))


def quantize_chunks(
  y_CS: jax.Array, noise_CS: jax.Array | None, shared: Outputs, own: Scratch, quantizer: Quantizer
) -> None:
  """Writes codes, scales and mask of rotated chunks to shared memory."""
  reduce: Callable[[jax.Array], jax.Array]
  if quantizer.scale == "quest":
    reduce = functools.partial(jnp.sum, axis=1)
    statistic_C = reduce(y_CS * y_CS)
  else:
    reduce = functools.partial(codes.largest_magnitude, axis=1)
    statistic_C = reduce(y_CS)
  chunks = quantizer.group // LANES
  if chunks > 1:
    statistic_C = over_neighbours(statistic_C, chunks, own, reduce)
  scale_C = codes.scale_of_statistic(statistic_C, quantizer)
  ratio_CS = y_CS / along_rows(scale_C, LANES)
  rounded_CS = codes.round_to_codes(ratio_CS, quantizer, noise_CS)
  shared.codes_CS[...] = codes.cast(rounded_CS, shared.codes_CS.dtype)
  shared.scales_C[...] = scale_C
  if shared.mask_CS is not None:
    trusted_CS = codes.is_trusted(ratio_CS, quantizer)
    shared.mask_CS[...] = jnp.where(trusted_CS, 1.0, 0.0).astype(jnp.int8)
