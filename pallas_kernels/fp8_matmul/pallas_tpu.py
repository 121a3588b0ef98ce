"""Multiplies 8-bit codes on TPU (Pallas Mosaic): products are scaled and added in VMEM.

One kernel serves all three products. It computes sums [P, Q] whose left operand is contracted over
its last axis and whose right one over its first, as the matrix unit reads them. What has a scale
for each 128 of its rows stands left, so that the scale of a result varies along the lanes alone:
two vector operations a result (three for integers, which are converted), one more where both sides
have tiles. The quantisers write codes in the orientation in which they are multiplied; transposes
that stand here between the two cancel.

Values are tested in Pallas's interpreter and in the simulator of a TPU (races, poisoned memory,
shuffled grid order, one and two cores); compiled ahead of time for v5e, v5p, v6e and tpu7x. No TPU
has run it.
"""

# P rows and Q columns of the kernel's product, C contracted, S blocks of C in a tile
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.fp8_matmul import blocks
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.quantize_tpu import quantize

__all__ = ["contract", "quantize", "unsupported"]


def unsupported(block: int, formats: tuple[str, str], interpret: Any) -> str | None:
  """Returns why the kernels cannot run with blocks of this size here, or None if they can."""
  del formats  # it multiplies any
  if (reason := why_no_tpu(interpret)) is not None:
    return reason
  if interpret:
    return None if block in (128, 256) else f"block={block} is neither 128 nor 256"
  sides = {128, pltpu.get_tpu_info().mxu_column_size}
  return None if block in sides else f"block={block} is none of {sorted(sides)} on this chip"


def contract(left: Quantized, right: Quantized, how: Contraction) -> jax.Array:
  """Multiplies quantised matrices: with the one that has square blocks as the left operand."""
  swapped = how.blocks[1][1 - how.axes[1]] > 1
  first, second = (right, left) if swapped else (left, right)
  first_axis, second_axis = how.axes[::-1] if swapped else how.axes
  blockwise = how.blocks[1 if swapped else 0][1 - first_axis] > 1
  a_PC = first.codes if first_axis == 1 else first.codes.T
  b_CQ = second.codes if second_axis == 0 else second.codes.T
  a_scales = first.scales.T if first_axis == 1 else first.scales
  b_scales = second.scales.T if second_axis == 1 else second.scales
  if how.blocks[0 if swapped else 1][1 - second_axis] > 1:  # blocks on both sides
    b_scales = jnp.repeat(b_scales, how.block, axis=1)[:, : b_CQ.shape[1]]
  return _product(a_PC, a_scales, b_CQ, b_scales, how, blockwise=blockwise, transposed=swapped)


def _product(
  a_PC: jax.Array,
  a_scales: jax.Array,
  b_CQ: jax.Array,
  b_scales: jax.Array,
  how: Contraction,
  *,
  blockwise: bool,
  transposed: bool,
) -> jax.Array:
  """Returns the product [P, Q], or [Q, P]; scales are [blocks of C, P (or its blocks)], [.., Q]."""
  (P, C), Q, size = a_PC.shape, b_CQ.shape[1], how.block
  chip = blocks.core(how.interpret)
  tile = blocks.product_tile(P, Q, C, size, blockwise, chip)
  tiles_P, tiles_Q, tiles_C = pl.cdiv(P, tile.P), pl.cdiv(Q, tile.Q), pl.cdiv(C, tile.C)
  S = tile.C // size

  def pad(array: jax.Array, rows: int, columns: int) -> jax.Array:
    return pad_axis(pad_axis(array, rows, 0), columns, 1)

  rows, columns, depth = tiles_P * tile.P, tiles_Q * tile.Q, tiles_C * tile.C
  b_scales = pad(b_scales, tiles_C * S, columns).reshape(tiles_C, S, columns)
  if blockwise:
    per_tile = pl.cdiv(tile.P, size)
    a_scales = _scales_of_tiles(a_scales, tiles_P, tile.P, tiles_C * S, size)
    a_scales = a_scales.reshape(tiles_C, S, tiles_P, per_tile).transpose(2, 0, 1, 3)
    a_scales_block = pl.BlockSpec((None, None, S, per_tile), lambda p, q, c: (p, c, 0, 0))
  else:
    a_scales = pad(a_scales, tiles_C * S, rows).reshape(tiles_C, S, rows)
    a_scales_block = pl.BlockSpec((None, S, tile.P), lambda p, q, c: (c, 0, p))
  shape = (columns, rows) if transposed else (rows, columns)
  out_block = (tile.Q, tile.P) if transposed else (tile.P, tile.Q)
  sums_in_out = how.out_dtype == jnp.float32 and not transposed
  out = pl.pallas_call(
    functools.partial(
      _kernel,
      tile=tile,
      size=size,
      native=how.native,
      blockwise=blockwise,
      transposed=transposed,
      whole=tiles_C == 1,
    ),
    grid=(tiles_P, tiles_Q, tiles_C),
    in_specs=[
      pl.BlockSpec((tile.P, tile.C), lambda p, q, c: (p, c)),
      a_scales_block,
      pl.BlockSpec((tile.C, tile.Q), lambda p, q, c: (c, q)),
      pl.BlockSpec((None, S, tile.Q), lambda p, q, c: (c, 0, q)),
    ],
    out_specs=pl.BlockSpec(out_block, lambda p, q, c: (q, p) if transposed else (p, q)),
    out_shape=varying_struct(shape, how.out_dtype, a_PC),
    scratch_shapes=[] if sums_in_out else [pltpu.VMEM((tile.P, tile.Q), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=int(0.9 * chip.vmem),
      flags=chip.flags,
    ),
    interpret=how.interpret,
    name="fp8_matmul",
  )(pad(a_PC, rows, depth), a_scales, pad(b_CQ, depth, columns), b_scales)
  return out[:Q, :P] if transposed else out[:P, :Q]


def _scales_of_tiles(
  scales: jax.Array, tiles: int, rows: int, blocks_of_c: int, size: int
) -> jax.Array:
  """Pads scales [blocks of C, blocks of P] so that each tile of P rows has whole blocks."""
  return pad_axis(pad_axis(scales, blocks_of_c, 0), tiles * pl.cdiv(rows, size), 1)


def _kernel(
  a: Any,
  a_scales: Any,
  b: Any,
  b_scales: Any,
  out: Any,
  *scratch: Any,
  tile: blocks.Tile,
  size: int,
  native: bool,
  blockwise: bool,
  transposed: bool,
  whole: bool,
) -> None:
  """Adds a tile's blocks of C to the sums, part by part, and writes them after the last.

  Without scratch the sums are the result's own block. `whole`: the tile has all blocks of C, so
  that sums start with a product; else they start with zeros at the first tile.
  """
  (sums,) = scratch or (out,)
  if not whole:

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
      sums[...] = jnp.zeros_like(sums)

  S = tile.C // size
  for p in range(0, tile.P, tile.part_P):
    rows = slice(p, p + tile.part_P)
    spread = [] if blockwise else [spread_over_lanes(a_scales[s : s + 1, rows]) for s in range(S)]
    for q in range(0, tile.Q, tile.part_Q):
      columns = slice(q, q + tile.part_Q)
      total = None if whole else sums[rows, columns]
      for s in range(S):
        inner = slice(s * size, (s + 1) * size)
        product = multiply(a[rows, inner], b[inner, columns], native)
        b_scale = b_scales[s : s + 1, columns]
        if blockwise:
          scaled = scale_blocks(product, a_scales[s : s + 1], b_scale, p, size)
        else:
          repeats = tile.part_Q // blocks.LANES
          scaled = product * b_scale * jnp.concatenate([spread[s]] * repeats, axis=1)
        total = scaled if total is None else total + scaled
      sums[rows, columns] = total

  if scratch:

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish() -> None:
      total = sums[...]
      out[...] = (total.T if transposed else total).astype(out.dtype)


def multiply(a: jax.Array, b: jax.Array, native: bool) -> jax.Array:
  """Multiplies codes as they are, or widened to bfloat16, which holds each of them exactly."""
  if not native:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  total = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
  axes = (((1,), (0,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=total).astype(jnp.float32)


def scale_blocks(
  product: jax.Array, a_scales: jax.Array, b_scale: jax.Array, first_row: int, size: int
) -> jax.Array:
  """Scales a product whose rows share a scale by blocks: the scales are multiplied first."""
  scaled, at = [], 0
  while at < product.shape[0]:
    block = (first_row + at) // size
    rows = min((block + 1) * size - first_row, product.shape[0]) - at
    scaled.append(product[at : at + rows] * (b_scale * a_scales[:, block : block + 1]))
    at += rows
  return jnp.concatenate(scaled, axis=0)


def spread_over_lanes(row_1P: jax.Array) -> jax.Array:
  """Moves [1, P] along the lanes to the sublanes, the same number in each of 128 lanes."""
  return jnp.broadcast_to(row_1P, (blocks.LANES, row_1P.shape[1])).T
