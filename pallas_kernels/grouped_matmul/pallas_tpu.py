"""Multiplies groups of rows on TPU: floats with JAX's megablox kernels, codes with two of our own.

Both visit tiles of rows in order, with the group of each visit by scalar prefetch; a tile that two
groups share is visited twice, and each visit writes its own rows. Codes: the whole K lies in VMEM,
and every 128 of it are multiplied, scaled in float32 and added. The gradient of the matrices visits
padded blocks of 128 rows, which have one group each, and adds to that group's block in VMEM.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# T rows, K inner, N outer size of a matrix, E groups, P padded rows, S blocks of padded rows
# R rows, C columns of a tile, B contracted numbers that share a scale
from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.fp8_matmul import blocks as fp8_blocks
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.fp8_matmul.pallas_tpu import (
  multiply,
  quantize,
  scale_blocks,
  spread_over_lanes,
)
from pallas_kernels.grouped_matmul.segments import Segments

megablox: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
LANES = 128

__all__ = ["quantize", "rows", "unsupported", "weights"]


def unsupported(
  x_TK: jax.Array, w_EKN: jax.Array, dtype: str | None, block: int, native: bool, interpret: Any
) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  if (reason := why_no_tpu(interpret)) is not None:
    return reason
  if dtype is None:
    good = x_TK.dtype in (jnp.float32, jnp.bfloat16)
    return None if good else f"x_TK.dtype={x_TK.dtype}, the kernel takes float32 and bfloat16"
  K, N = w_EKN.shape[1:]
  if K % LANES or N % LANES or block != LANES:
    return f"K={K}, N={N}, block={block}: codes need multiples of {LANES}, and blocks of {LANES}"
  if not native:
    return f"dtype={dtype!r}: the kernel multiplies codes as they are, and this chip does not"
  if None in (
    rows_tile(x_TK.shape[0], N, K, block, interpret),
    rows_tile(x_TK.shape[0], K, N, block, interpret),
  ):
    return f"w_EKN.shape={w_EKN.shape}: rows of this width do not fit in VMEM"
  return None


def rows_tile(T: int, P: int, C: int, size: int, interpret: Any) -> fp8_blocks.Tile | None:
  """Returns the tile of the rows' product that fits in VMEM with all of C: `fp8_matmul`'s parts.

  Q are rows, which groups cut: half as many as there leave less that is computed in vain.
  """
  chip = fp8_blocks.core(interpret)
  whole = fp8_blocks.product_tile(P, T, C, size, True, chip)
  blocks_of_c = C // size
  steps = max(n for n in range(1, whole.C // size + 1) if blocks_of_c % n == 0)
  for side in (1024, 512, 256, 128):
    side_P = next(n for n in range(min(side, whole.P), 0, -LANES) if P % n == 0)
    side_Q = min(side, 512, whole.Q)
    moved = (side_P + side_Q) * C + 4 * side_P * side_Q + 4 * side_Q * blocks_of_c
    if 2 * moved + 12 * side_P * side_Q < 0.8 * chip.vmem:
      parts = (
        max(n for n in range(LANES, min(most, length) + 1, LANES) if length % n == 0)
        for length, most in ((side_P, whole.part_P), (side_Q, whole.part_Q))
      )
      return fp8_blocks.Tile(side_P, side_Q, steps * size, *parts)
  return None


def rows(
  left: Any, right: Any, sizes_E: jax.Array, axis: int, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns row t of `left` times the matrix of its group, contracted over the matrix's `axis`."""
  T = jax.tree.leaves(left)[0].shape[0]
  if isinstance(left, Quantized):
    y_TN = quantized_rows(left, right, sizes_E, axis, how, interpret)
  else:
    tiling = (
      min(512, round_up(T, LANES)),
      *(_divide(size) for size in right.shape[1:][:: 1 - 2 * axis]),
    )
    padded = pad_axis(left, round_up(T, tiling[0]), 0)
    with jax.default_matmul_precision("highest" if left.dtype == jnp.float32 else "default"):
      y_TN = megablox.gmm(
        padded,
        right,
        sizes_E,
        preferred_element_type=how.out_dtype,
        tiling=tiling,
        transpose_rhs=axis == 1,
        interpret=interpret,
      )
  # tiles that no group visits are not written
  inside_T1 = jnp.arange(T)[:, None] < jnp.sum(sizes_E)
  return jnp.where(inside_T1, y_TN[:T], jnp.zeros((), y_TN.dtype))


def _divide(size: int) -> int:
  """Returns the tile of an axis: all of it, or at most 1024."""
  return size if size <= 1024 else next((t for t in (1024, 768, 512) if size % t == 0), 512)


def quantized_rows(
  left: Quantized,
  right: Quantized,
  sizes_E: jax.Array,
  axis: int,
  how: Contraction,
  interpret: Any,
) -> jax.Array:
  """Returns the product in codes; rows of no group are not written.

  A tile is made transposed, matrix times rows, so that the matrices' scales are numbers of whole
  tiles and the rows' scales lie along the lanes.
  """
  (T, C), size = left.codes.shape, how.block
  E, P = len(right.codes), right.codes.shape[2 - axis]
  tile = rows_tile(T, P, C, size, interpret)
  assert tile is not None, "unsupported() has let through what does not fit"
  padded = round_up(T, tile.Q)
  codes_CT, scales_ST = (pad_axis(a.T, padded, 1) for a in left)
  per_tile = pl.cdiv(tile.P, size)
  tiles_P = P // tile.P
  scales_EPS = right.scales if axis == 1 else right.scales.swapaxes(1, 2)
  scales_ESP = scales_EPS.reshape(E, tiles_P, per_tile, C // size).swapaxes(2, 3)
  # [E P, C], or [P, E C], which the quantiser has written
  codes = right.codes.reshape(-1, right.codes.shape[2])
  codes = codes if axis == 1 else codes.T

  def matrix_index(p: Any, v: Any, offsets: Any, group: Any, tiles: Any) -> tuple[Any, Any]:
    return (group[v] * tiles_P + p, 0) if axis == 1 else (p, group[v])

  (offsets_E, group_V, tile_V), visits = megablox.make_group_metadata(
    group_sizes=sizes_E,
    m=padded,
    tm=tile.Q,
    start_group=jnp.zeros((), jnp.int32),
    num_nonzero_groups=E,
    visit_empty_groups=False,
  )
  chip = fp8_blocks.core(interpret)
  return pl.pallas_call(
    functools.partial(rows_kernel, tile=tile, size=size),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(tiles_P, visits),
      in_specs=[
        pl.BlockSpec((tile.P, C), matrix_index),
        pl.BlockSpec(
          (None, None, C // size, per_tile),
          lambda p, v, offsets, group, tiles: (group[v], p, 0, 0),
        ),
        pl.BlockSpec((C, tile.Q), lambda p, v, offsets, group, tiles: (0, tiles[v])),
        pl.BlockSpec((C // size, tile.Q), lambda p, v, offsets, group, tiles: (0, tiles[v])),
      ],
      scratch_shapes=[pltpu.VMEM((tile.P, tile.Q), jnp.float32)],
      out_specs=pl.BlockSpec((tile.Q, tile.P), lambda p, v, offsets, group, tiles: (tiles[v], p)),
    ),
    out_shape=varying_struct((padded, P), how.out_dtype, left.codes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=int(0.9 * chip.vmem),
      flags=chip.flags,
    ),
    interpret=interpret,
    name="grouped_matmul_rows",
  )(offsets_E, group_V, tile_V, codes, scales_ESP, codes_CT, scales_ST)


def rows_kernel(
  offsets: Any,
  group: Any,
  tiles: Any,
  w_PC: Any,
  w_scales: Any,
  x_CQ: Any,
  x_scales: Any,
  y_QP: Any,
  sums_PQ: Any,
  *,
  tile: fp8_blocks.Tile,
  size: int,
) -> None:
  """Computes a tile for one group and writes the rows of that group."""
  S = tile.C // size

  def add(step: Any, first: bool) -> None:
    for p in range(0, tile.P, tile.part_P):
      for q in range(0, tile.Q, tile.part_Q):
        rows, columns = slice(p, p + tile.part_P), slice(q, q + tile.part_Q)
        total = None if first else sums_PQ[rows, columns]
        for s in range(S):
          at = step * S + s
          inner = pl.ds(at * size if first else pl.multiple_of(at * size, size), size)
          product = multiply(w_PC[rows, inner], x_CQ[inner, columns], native=True)
          scales = w_scales[pl.ds(at, 1)], x_scales[pl.ds(at, 1), columns]
          scaled = scale_blocks(product, *scales, p, size)
          total = scaled if total is None else total + scaled
        sums_PQ[rows, columns] = total

  add(0, True)
  steps = x_CQ.shape[0] // tile.C
  if steps > 1:
    jax.lax.fori_loop(1, steps, lambda step, _: add(step, False), None)
  visit = pl.program_id(1)
  row_QP = jax.lax.broadcasted_iota(jnp.int32, y_QP.shape, 0) + tiles[visit] * tile.Q
  own_QP = (row_QP >= offsets[group[visit]]) & (row_QP < offsets[group[visit] + 1])
  others_QP = y_QP[...].astype(jnp.float32)
  y_QP[...] = jnp.where(own_QP, sums_PQ[...].T, others_QP).astype(y_QP.dtype)


def weights(
  left: Any, right: Any, segments: Segments, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns for each group the product of its rows, left^T right: [E, K, N]; codes are padded."""
  if isinstance(left, Quantized):
    dw_EKN = quantized_weights(left, right, segments, how, interpret)
    # groups without rows are not visited
    return jnp.where((segments.sizes_E > 0)[:, None, None], dw_EKN, 0.0)
  T = left.shape[0]
  tiling = (min(512, round_up(T, LANES)), _divide(left.shape[1]), _divide(right.shape[1]))
  left, right = (pad_axis(a, round_up(T, tiling[0]), 0) for a in (left, right))
  with jax.default_matmul_precision("highest" if left.dtype == jnp.float32 else "default"):
    return megablox.tgmm(
      left.swapaxes(0, 1),
      right,
      segments.sizes_E,
      preferred_element_type=how.out_dtype,
      tiling=tiling,
      interpret=interpret,
    )


def quantized_weights(
  left: Quantized, right: Quantized, segments: Segments, how: Contraction, interpret: Any
) -> jax.Array:
  """Returns the gradient of every matrix that has rows; other groups' are not written."""
  K, N = left.codes.shape[1], right.codes.shape[1]
  E, S = segments.sizes_E.shape[0], segments.group_S.shape[0]
  chip = fp8_blocks.core(interpret)
  sizes = (LANES,) if interpret else (1024, 512, 256, 128)
  k, n = (next(size for size in sizes if axis % size == 0) for axis in (K, N))

  def scales_of(size: int, which: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, size), lambda *at: (at[2], 0, at[which]))

  return pl.pallas_call(
    functools.partial(weights_kernel, part=min(k, n, 512)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(K // k, N // n, segments.used),
      in_specs=[
        pl.BlockSpec((k, LANES), lambda i, j, s, group: (i, s)),
        scales_of(k, 0),
        pl.BlockSpec((LANES, n), lambda i, j, s, group: (s, j)),
        scales_of(n, 1),
      ],
      out_specs=pl.BlockSpec((1, k, n), lambda i, j, s, group: (group[s], i, j)),
    ),
    out_shape=varying_struct((E, K, N), jnp.float32, left.codes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=int(0.9 * chip.vmem),
      flags=chip.flags,
    ),
    interpret=interpret,
    name="grouped_matmul_weights",
  )(
    segments.group_S,
    left.codes.T,
    left.scales.reshape(S, 1, K),
    right.codes,
    right.scales.reshape(S, 1, N),
  )


def weights_kernel(
  group: Any,
  x_KB: Any,
  x_scales: Any,
  dy_BN: Any,
  dy_scales: Any,
  dw_1KN: Any,
  *,
  part: int,
) -> None:
  """Adds the product of one block of rows to its group's gradient, part by part."""
  block = pl.program_id(2)

  @pl.when((block == 0) | (group[block] != group[jnp.maximum(block - 1, 0)]))
  def start() -> None:
    dw_1KN[...] = jnp.zeros_like(dw_1KN)

  _, K, N = dw_1KN.shape
  for k in range(0, K, part):
    rows = slice(k, k + part)
    columns = jnp.concatenate([spread_over_lanes(x_scales[0, :, rows])] * (part // LANES), axis=1)
    for n in range(0, N, part):
      at = slice(n, n + part)
      product = multiply(x_KB[rows], dy_BN[:, at], native=True)
      dw_1KN[0, rows, at] += product * dy_scales[0, :, at] * columns
