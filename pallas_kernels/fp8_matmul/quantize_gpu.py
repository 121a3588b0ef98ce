"""Quantises on Hopper in one pass: reads X once, writes codes and scales.

Codes leave the kernel as `pallas_gpu` multiplies them: tiles lie along the rows of memory, so that
those of tiles along columns are transposed, [N, M]. A warpgroup turns 64 x 128 numbers, which it
reads transposed where the codes are, into codes; the largest magnitude of a row of registers is its
tile's, and that of a square block is exchanged between the two warpgroups.
"""

# M rows and N columns of X; R rows and C columns of codes in memory, S blocks of C
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import (
  ROWS,
  WARPGROUPS,
  along_rows,
  launch,
  load,
  load_columns,
  load_transposed,
  swizzled,
)
from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.fp8_matmul.codes import (
  Format,
  Quantized,
  encode,
  largest_magnitude,
  scale_of_block,
)

TILE = WARPGROUPS * ROWS


class Recipe(NamedTuple):
  """Holds what the kernel needs to know."""

  form: Format
  mode: str
  square: bool
  transposed: bool
  by_xla: bool


class Outputs(NamedTuple):
  """Holds codes and scales in memory: arrays, references, or the shared memory of a warpgroup."""

  codes_RC: Any
  scales_SR: Any


def quantize(
  x_MN: jax.Array,
  block: tuple[int, int],
  form: Format,
  mode: str,
  interpret: Any = False,
  transposed: bool = False,
) -> Quantized:
  """Returns codes [M, N], in memory [N, M] for squares if `transposed` and for tiles along columns.

  Tiles along rows are never transposed.
  """
  M, N = x_MN.shape
  square = min(block) > 1
  transposed = transposed if square else block[1] == 1
  how = Recipe(form, mode, square, transposed, by_xla=bool(interpret))
  if x_MN.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    x_MN = x_MN.astype(jnp.float32)
  x_MN = pad_axis(pad_axis(x_MN, round_up(M, TILE), 0), round_up(N, TILE), 1)
  R, C = x_MN.shape[::-1] if transposed else x_MN.shape
  read = (TILE, ROWS) if transposed else (ROWS, TILE)
  out = launch(
    functools.partial(quantize_tile, how=how),
    interpret,
    out_type=Outputs(
      jax.ShapeDtypeStruct((R, C), form.dtype),
      jax.ShapeDtypeStruct((C // TILE, R), jnp.float32),
    ),
    scratch_types=(
      plgpu.SMEM((WARPGROUPS, *read), x_MN.dtype, transforms=swizzled(x_MN.dtype)),
      plgpu.SMEM((WARPGROUPS, ROWS, TILE), form.dtype, transforms=swizzled(form.dtype)),
      plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
      plgpu.SMEM((TILE,), jnp.float32),
      plgpu.Barrier(num_barriers=WARPGROUPS),
      plgpu.Barrier(num_arrivals=WARPGROUPS),
    ),
    grid=(R // TILE, C // TILE),
    grid_names=("rows", "columns"),
    num_threads=WARPGROUPS,
    thread_name="wg",
  )(x_MN)
  codes = out.codes_RC.T if transposed else out.codes_RC
  scales = out.scales_SR if transposed else out.scales_SR.T
  if square:
    scales = scales[:, ::TILE] if transposed else scales[::TILE]
  return Quantized(codes[:M, :N], scales[: pl.cdiv(M, block[0]), : pl.cdiv(N, block[1])])


def quantize_tile(
  x: Any,
  codes: Any,
  scales: Any,
  x_shared: Any,
  codes_shared: Any,
  scales_shared: Any,
  largest: Any,
  copied: Any,
  exchanged: Any,
  *,
  how: Recipe,
) -> None:
  """Quantises 128 x 128 numbers; each warpgroup copies, encodes and writes its half alone."""
  group = jax.lax.axis_index("wg")
  block, tile = jax.lax.axis_index("columns"), jax.lax.axis_index("rows")
  row = tile * TILE + group * ROWS
  rows, columns = pl.ds(row, ROWS), pl.ds(block * TILE, TILE)
  read = x_shared.at[group]
  source = x.at[columns, rows] if how.transposed else x.at[rows, columns]
  plgpu.copy_gmem_to_smem(source, read, copied.at[group])
  plgpu.barrier_wait(copied.at[group])
  x_RC = load_transposed(read) if how.transposed else load(read, plgpu.Layout.WGMMA)
  x_RC = x_RC.astype(jnp.float32)
  amax_R = largest_magnitude(x_RC, 1)
  if how.square:
    largest[pl.ds(group * ROWS, ROWS)] = amax_R
    plgpu.barrier_arrive(exchanged)
    plgpu.barrier_wait(exchanged)
    every_RC = jax.lax.broadcast_in_dim(load_columns(largest), (ROWS, TILE), [1])
    # XLA, which interprets, sees one number here, and would multiply by its reciprocal below.
    amax_R = jax.lax.optimization_barrier(largest_magnitude(every_RC, 1))
  scale_R = scale_of_block(amax_R, how.form.largest, how.mode)
  scale_RC = along_rows(scale_R, TILE)
  codes_shared.at[group][...] = encode(x_RC, scale_RC, how.form, how.by_xla)
  scales_shared.at[group][...] = scale_R
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(codes_shared.at[group], codes.at[rows, columns])
  plgpu.copy_smem_to_gmem(scales_shared.at[group], scales.at[block, rows])
  plgpu.wait_smem_to_gmem(0)
