"""Multiplies 8-bit codes on Hopper (Pallas Mosaic GPU): products are scaled and added in registers.

One kernel serves all three products. Both operands are read along the contracted axis, [P, C] and
[Q, C], as wgmma takes 8-bit codes; the quantisers write them so, and transposes that stand here
between the two cancel. A pipeline step is one block of scales, 128 bytes of each row. Two
warpgroups take turns on the tensor cores, 64 rows each: one multiplies its block, from zero, while
the other scales the last product and adds it in float32. (Hopper keeps about 14 bits inside of a
chain of wgmma, so that sums over the whole axis would lose up to 2 %.)

Values, gradients and races are tested in the simulator of a GPU (jax 0.11 and later), which adds in
float32; it lowers for Hopper on jax 0.10 to 0.12. No GPU has run it.
"""

# P rows and Q columns of the kernel's product, C contracted, S blocks of C
from __future__ import annotations

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
  filled,
  launch,
  load_columns,
  load_rows,
  swizzled,
)
from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.quantize_gpu import quantize
from pallas_kernels.fp8_matmul.xla import free_scales

__all__ = ["contract", "quantize", "unsupported"]

BLOCK = 128  # of C: what a scale covers, and with 8-bit codes the widest swizzle
TILE = WARPGROUPS * ROWS  # of P and Q: 64 registers a thread for a product, 64 for the sum
STAGES = 4  # 33 KiB each; a float32 result takes 64 of the 227 KiB that a block may use
MIXED = jax.__version_info__ >= (0, 12)  # an older wgmma takes one type of codes at a time


def unsupported(block: int, formats: tuple[str, str], interpret: Any) -> str | None:
  """Returns why the kernels cannot run with such blocks and formats here, or None if they can."""
  if block != BLOCK:
    return f"block={block} is not {BLOCK}"
  if formats[0] != formats[1] and ("int8" in formats or not MIXED):
    needs = "cannot be mixed" if "int8" in formats else "need the wgmma of jax 0.12"
    return f"formats {formats} in one product {needs}, this is jax {jax.__version__}"
  return why_no_hopper(interpret)


class Operands(NamedTuple):
  """Holds what the kernel reads; arrays outside of it, references inside."""

  a_PC: Any
  a_scales_SP: Any
  b_QC: Any
  b_scales: Any
  """[S, Q], or [S, Q / 128] where b has a scale for each square block"""


def contract(left: Quantized, right: Quantized, how: Contraction) -> jax.Array:
  """Multiplies quantised matrices, padded with zeros to whole tiles."""
  a_PC = left.codes if how.axes[0] == 1 else left.codes.T
  b_QC = right.codes if how.axes[1] == 1 else right.codes.T
  a_scales_SP = free_scales(left, how.axes[0], how.blocks[0])
  square = how.blocks[1][1 - how.axes[1]] > 1
  if square:
    b_scales = right.scales if how.axes[1] == 0 else right.scales.T
  else:
    b_scales = free_scales(right, how.axes[1], how.blocks[1])
  (P, C), Q = a_PC.shape, b_QC.shape[0]
  rows, columns, depth = round_up(P, TILE), round_up(Q, TILE), round_up(C, BLOCK)
  operands = Operands(
    a_PC=pad_axis(pad_axis(a_PC, rows, 0), depth, 1),
    a_scales_SP=pad_axis(a_scales_SP, rows, 1),
    b_QC=pad_axis(pad_axis(b_QC, columns, 0), depth, 1),
    b_scales=b_scales if square else pad_axis(b_scales, columns, 1),
  )
  return multiply(operands, square, how)[:P, :Q]


def multiply(operands: Operands, square: bool, how: Contraction) -> jax.Array:
  """Returns the product [P, Q] of whole tiles; a wider result is cast from float32 sums."""
  P, Q = operands.a_PC.shape[0], operands.b_QC.shape[0]
  dtype = jnp.float32 if jnp.dtype(how.out_dtype).itemsize > 4 else how.out_dtype

  def body(operands: Operands, out: Any, shared: Any, turns: Any) -> None:
    multiply_tile(operands, out, shared, turns, square)

  (product_PQ,) = launch(
    body,
    how.interpret,
    out_type=(jax.ShapeDtypeStruct((P, Q), dtype),),
    scratch_types=(
      plgpu.SMEM((WARPGROUPS, ROWS, TILE), dtype, transforms=swizzled(dtype)),
      plgpu.Barrier(num_barriers=WARPGROUPS),
    ),
    grid=(P // TILE, Q // TILE),
    grid_names=("rows", "columns"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
  )(operands)
  return product_PQ.astype(how.out_dtype)


def multiply_tile(operands: Operands, out: Any, shared: Any, turns: Any, square: bool) -> None:
  """Multiplies one tile of the grid. `turns` has a barrier for each warpgroup: it may multiply."""
  group = jax.lax.axis_index("wg")
  other = 1 - group
  row, tile = jax.lax.axis_index("rows") * TILE, jax.lax.axis_index("columns")
  column = tile * TILE

  def consume(run_pipeline: Callable[[Any], Any]) -> None:
    @pl.when(group == 1)
    def first_turn() -> None:
      plgpu.barrier_arrive(turns.at[other])

    sum_RW = run_pipeline(filled((ROWS, TILE), 0.0))

    @pl.when(group == 0)
    def last_turn() -> None:
      plgpu.barrier_wait(turns.at[group])

    mine = shared.at[group]
    mine[...] = sum_RW.astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine, out.at[pl.ds(row + group * ROWS, ROWS), pl.ds(column, TILE)])
    plgpu.wait_smem_to_gmem(0)

  def add_block(indices: Any, a: Any, a_scales: Any, b: Any, *rest: Any) -> Any:
    *b_scales, sum_RW = rest

    def multiply_and_scale(product: Any) -> Any:
      plgpu.barrier_wait(turns.at[group])
      plgpu.wgmma(product, a.at[pl.ds(group * ROWS, ROWS)], b.transpose((1, 0)))
      plgpu.barrier_arrive(turns.at[other])
      scale_R = load_rows(a_scales.at[0, pl.ds(group * ROWS, ROWS)])
      if square:
        scale_R = scale_R * operands.b_scales[indices[0], tile]
      scale_RW = along_rows(scale_R, TILE)
      if not square:
        scale_W = load_columns(b_scales[0].at[0])
        scale_RW = scale_RW * jax.lax.broadcast_in_dim(scale_W, (ROWS, TILE), [1])
      return product[...].astype(jnp.float32) * scale_RW  # waits for the product

    total = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return sum_RW + pl.run_scoped(multiply_and_scale, plgpu.ACC((ROWS, TILE), total))

  def codes_block(dtype: Any) -> Any:
    return plgpu.BlockSpec((TILE, BLOCK), lambda s: (0, s), transforms=swizzled(dtype))

  scales_block = plgpu.BlockSpec((1, TILE), lambda s: (s, 0))
  rows, columns = pl.ds(row, TILE), pl.ds(column, TILE)
  blocks = [codes_block(operands.a_PC.dtype), scales_block, codes_block(operands.b_QC.dtype)]
  arrays = [operands.a_PC.at[rows], operands.a_scales_SP.at[:, rows], operands.b_QC.at[columns]]
  if not square:
    blocks.append(scales_block)
    arrays.append(operands.b_scales.at[:, columns])
  plgpu.emit_pipeline_warp_specialized(
    add_block,
    grid=(operands.a_PC.shape[1] // BLOCK,),
    memory_registers=40,
    in_specs=blocks,
    wg_axis="wg",
    num_compute_wgs=WARPGROUPS,
    max_concurrent_steps=STAGES,
    compute_context=consume,
  )(*arrays)
