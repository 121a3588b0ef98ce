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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import ROWS, WARPGROUPS, launch, swizzled
from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.gpu_kernel import (
  LANES,
  Matrices,
  Operands,
  Outputs,
  Plan,
  Scratch,
  rotate_tiles,
)
from pallas_kernels.hadamard.matrices import Rotation, base_matrix, sylvester

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
