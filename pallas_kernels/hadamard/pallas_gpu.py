"""Rotates and quantises on Hopper (Pallas Mosaic GPU): one pass over memory.

X is read as chunks of 128 numbers. A warpgroup multiplies up to 64 of them from the right by
H_128 on the tensor cores, and for a larger matrix H_A (x) H_128 from the left by blocks of H_A, one
for each rotation that is among its chunks. Entries are +-1, and what is multiplied goes in as many
bfloat16 parts as hold it exactly: 1 for bfloat16, 2 for float16, 3 for float32 and between the two
products. Groups of several chunks exchange their statistic through shared memory.

Values, gradients, codes and races are tested in the simulator of a GPU (jax 0.11 and later); it
lowers for Hopper on jax 0.10 to 0.12. No GPU has run it.
"""

# C chunks (of a tile: T, in 64 rows of registers), S lanes of a chunk, R rows and W width of X
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import (
  ROWS,
  WARPGROUPS,
  along_rows,
  counted,
  launch,
  load,
  load_columns,
  swizzled,
)
from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation, base_matrix, sylvester

LANES = 128
STEPS = 8  # tiles of a warpgroup, which share the matrices' copies
PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2, jnp.dtype(jnp.float32): 3}


def unsupported(
  x_RW: Any, rotation: Rotation, quantizer: Quantizer | None, interpret: Any
) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  if x_RW.dtype not in PARTS:
    return f"x.dtype={x_RW.dtype}, the kernel takes bfloat16, float16 and float32"
  if rotation.width % LANES or rotation.power % min(LANES, rotation.n):
    return (
      f"the last axis of x, {rotation.width}, must be a multiple of {LANES}, and the power of two "
      f"in the order {rotation.n} at least {LANES} beside base={rotation.base}"
    )
  if quantizer is not None:
    if quantizer.group % LANES:
      return f"group={quantizer.group}, the kernel takes multiples of {LANES}"
    if quantizer.format == "mxfp4":
      return "dtype='mxfp4', Hopper has no 4-bit floats"
    if quantizer.scale == "quest" and jax.__version_info__ < (0, 12):
      return f"scale='quest' needs the square root of jax 0.12, this is jax {jax.__version__}"
  if tile_chunks(rotation, quantizer) == 0:
    group = "" if quantizer is None else f" with group={quantizer.group}"
    return (
      f"the order {rotation.n}{group}: a warpgroup multiplies {ROWS} chunks of {LANES}, which must "
      "hold whole rotations and groups in multiples of 8"
    )
  return why_no_hopper(interpret)


def tile_chunks(rotation: Rotation, quantizer: Quantizer | None) -> int:
  """Returns how many chunks a warpgroup rotates at a time: whole rotations and groups, or 0."""
  together = math.lcm(max(1, rotation.n // LANES), 8)
  if quantizer is not None:
    together = math.lcm(together, quantizer.group // LANES)
  return ROWS // together * together


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

  y_CS: Any | None = None
  codes_CS: Any | None = None
  scales_C: Any | None = None
  mask_CS: Any | None = None


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


def rotate(
  x_RW: jax.Array,
  rotation: Rotation,
  signs_W: jax.Array | None,
  out_signs_W: jax.Array | None,
  interpret: Any = False,
) -> jax.Array:
  """Returns (x . signs) H / sqrt(n) . out_signs, in x's dtype."""
  return run(x_RW, rotation, None, signs_W, out_signs_W, None, interpret).y_CS


def rotate_quantize(
  x_RW: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer,
  signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes [R, W], scales [R, W / group] and, for "quest", the trust mask, int8 [R, W]."""
  out = run(x_RW, rotation, quantizer, signs_W, None, noise_RW, interpret)
  scales_RG = out.scales_C[:, :: quantizer.group // LANES]
  return out.codes_CS.astype(quantizer.form.dtype), scales_RG, out.mask_CS


def run(
  x_RW: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer | None,
  signs_W: jax.Array | None,
  out_signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
  interpret: Any,
) -> Outputs:
  """Runs the kernel on whole tiles, and returns its outputs as rows."""
  tile = tile_chunks(rotation, quantizer)
  C = x_RW.size // LANES
  programs = pl.cdiv(C, WARPGROUPS * tile)
  steps = max(n for n in range(1, STEPS + 1) if programs % n == 0)
  plan = Plan(rotation, quantizer, tile, steps, PARTS[x_RW.dtype], bool(interpret))
  total = programs * WARPGROUPS * tile

  def chunks(array_RW: jax.Array | None, rows: int) -> Any:
    return None if array_RW is None else pad_axis(array_RW.reshape(-1, LANES), rows, 0)

  operands = Operands(
    x_CS=chunks(x_RW, total),
    right_SS=right_matrix(rotation),
    same_SS=same_rotation(rotation),
    left_CC=left_matrix(rotation, tile),
    signs_CS=wrapped(signs_W, plan.chunks),
    out_signs_CS=wrapped(out_signs_W, plan.chunks),
    noise_CS=chunks(noise_RW, total + ROWS),
  )

  def outputs(make: Callable[[tuple[int, ...], Any], Any], rows: tuple[int, ...]) -> Outputs:
    if quantizer is None:
      return Outputs(y_CS=make((*rows, LANES), x_RW.dtype))
    dtype = jnp.int8 if jnp.issubdtype(quantizer.form.dtype, jnp.integer) else quantizer.form.dtype
    trusting = quantizer.scale == "quest"
    return Outputs(
      codes_CS=make((*rows, LANES), dtype),
      scales_C=make(rows, jnp.float32),
      mask_CS=make((*rows, LANES), jnp.int8) if trusting else None,
    )

  def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype) if shape[-1] == LANES else ())

  def shared_like(array: jax.Array | None) -> Any:
    return None if array is None else shared_matrix(array.shape)

  def shared_matrix(shape: tuple[int, ...]) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(jnp.bfloat16))

  (out,) = launch(
    functools.partial(rotate_tiles, plan=plan),
    interpret,
    out_type=(outputs(jax.ShapeDtypeStruct, (total,)),),
    scratch_types=(
      outputs(shared, (WARPGROUPS, ROWS)),
      Matrices(*(shared_like(array) for array in operands[1:4])),
      Scratch(
        x_CS=shared((WARPGROUPS, ROWS, LANES), x_RW.dtype),
        part_CS=shared((WARPGROUPS, ROWS, LANES), jnp.bfloat16),
        vector_C=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        copied=plgpu.Barrier(num_barriers=WARPGROUPS),
      ),
      plgpu.Barrier(num_arrivals=sum(array is not None for array in operands[1:4])),
    ),
    grid=(programs // steps,),
    grid_names=("tiles",),
    num_threads=WARPGROUPS,
    thread_name="wg",
  )(operands)
  return jax.tree.map(lambda array: array[:C].reshape(len(x_RW), -1), out)


def right_matrix(rotation: Rotation) -> jax.Array:
  """Returns H_128, or blocks of a smaller matrix along the diagonal; bfloat16."""
  n = min(rotation.n, LANES)
  return jnp.asarray(np.kron(np.eye(LANES // n), sylvester(n)), jnp.bfloat16)


def same_rotation(rotation: Rotation) -> jax.Array | None:
  """Returns 1 where two lanes of a chunk belong to the same rotation, if a chunk has several."""
  n = rotation.n
  if n >= LANES:
    return None
  return jnp.asarray(np.kron(np.eye(LANES // n), np.ones((n, n))), jnp.bfloat16)


def left_matrix(rotation: Rotation, tile: int) -> jax.Array | None:
  """Returns blocks of H_A, n = 128 A, along the diagonal for the chunks of a tile; bfloat16."""
  A = rotation.n // LANES
  if A <= 1:
    return None
  block = np.kron(base_matrix(rotation.base), sylvester(rotation.power // LANES))
  matrix = np.zeros((ROWS, ROWS))
  matrix[:tile, :tile] = np.kron(np.eye(tile // A), block)
  return jnp.asarray(matrix, jnp.bfloat16)


def wrapped(signs_W: jax.Array | None, chunks: int) -> jax.Array | None:
  """Returns the signs of a row's chunks, and again those of the chunks that follow them."""
  if signs_W is None:
    return None
  signs_CS = signs_W.astype(jnp.float32).reshape(chunks, LANES)
  return jnp.tile(signs_CS, (pl.cdiv(ROWS, chunks) + 1, 1))[: chunks + ROWS]


# ------------------------------------------------------------------------------------------ kernel


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

  def statistic(y: jax.Array) -> jax.Array:
    return codes.largest_magnitude(y, 1)

  def sum_of_squares(y: jax.Array) -> jax.Array:
    return jnp.sum(y * y, axis=1)

  quest = quantizer.scale == "quest"
  statistic_C = sum_of_squares(y_CS) if quest else statistic(y_CS)
  chunks = quantizer.group // LANES
  if chunks > 1:
    reduce = (lambda all_CC: jnp.sum(all_CC, axis=1)) if quest else statistic
    statistic_C = over_neighbours(statistic_C, chunks, own, reduce)
  scale_C = codes.scale_of_statistic(statistic_C, quantizer)
  ratio_CS = y_CS / along_rows(scale_C, LANES)
  rounded_CS = codes.round_to_codes(ratio_CS, quantizer, noise_CS)
  shared.codes_CS[...] = codes.cast(rounded_CS, shared.codes_CS.dtype)
  shared.scales_C[...] = scale_C
  if shared.mask_CS is not None:
    trusted_CS = codes.is_trusted(ratio_CS, quantizer)
    shared.mask_CS[...] = jnp.where(trusted_CS, 1.0, 0.0).astype(jnp.int8)
