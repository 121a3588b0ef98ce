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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.fp8_matmul.codes import Contraction, Quantized
from pallas_kernels.grouped_matmul.segments import Segments

megablox: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
LANES = 128


class Tile(NamedTuple):
  """Holds the sizes of a tile of the result."""

  rows: int
  columns: int


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
    _rows_tile(x_TK.shape[0], K, N, interpret),
    _rows_tile(x_TK.shape[0], N, K, interpret),
  ):
    return f"w_EKN.shape={w_EKN.shape}: rows of this width do not fit in VMEM"
  return None


def _vmem(interpret: Any) -> int:
  return 64 * 2**20 if interpret else pltpu.get_tpu_info().vmem_capacity_bytes


def _rows_tile(T: int, inner: int, outer: int, interpret: Any) -> Tile | None:
  """Returns the largest tile of the rows' product that fits in 80 % of VMEM with a whole row."""
  for rows, columns in ((512, 512), (256, 512), (256, 256), (128, 128)):
    rows, columns = (LANES, LANES) if interpret else (rows, columns)
    scales = 4 * (rows * max(LANES, inner // LANES) + columns * inner // LANES)
    moved = (rows + columns) * inner + 4 * rows * columns + scales
    if outer % columns == 0 and 2 * moved + 12 * rows * columns < 0.8 * _vmem(interpret):
      return Tile(min(rows, round_up(T, LANES)), columns)
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
  """Returns the product in codes; rows of no group are not written."""
  T, K = left.codes.shape
  N = right.codes.shape[2 - axis]
  tile = _rows_tile(T, K, N, interpret)
  assert tile is not None, "unsupported() has let through what does not fit"
  left = Quantized(left.codes, pad_axis(left.scales, round_up(K // LANES, LANES), 1))
  padded = jax.tree.map(lambda a: pad_axis(a, round_up(T, tile.rows), 0), left)
  (offsets_E, group_V, tile_V), visits = megablox.make_group_metadata(
    group_sizes=sizes_E,
    m=padded.codes.shape[0],
    tm=tile.rows,
    start_group=jnp.zeros((), jnp.int32),
    num_nonzero_groups=sizes_E.shape[0],
    visit_empty_groups=False,
  )
  # a scale for each 128 of K and each column
  scales = right.scales if axis == 0 else right.scales.swapaxes(1, 2)
  scales_ESN = jnp.repeat(scales, LANES, axis=2)
  matrix_block = (1, K, tile.columns) if axis == 0 else (1, tile.columns, K)

  def matrix_index(n: Any, v: Any, offsets: Any, group: Any, tiles: Any) -> tuple[Any, ...]:
    return (group[v], 0, n) if axis == 0 else (group[v], n, 0)

  def row_index(n: Any, v: Any, offsets: Any, group: Any, tiles: Any) -> tuple[Any, ...]:
    return tiles[v], 0

  return pl.pallas_call(
    functools.partial(rows_kernel, axis=axis),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(N // tile.columns, visits),
      in_specs=[
        pl.BlockSpec((tile.rows, K), row_index),
        pl.BlockSpec((tile.rows, padded.scales.shape[1]), row_index),
        pl.BlockSpec(matrix_block, matrix_index),
        pl.BlockSpec(
          (1, K // LANES, tile.columns), lambda n, v, offsets, group, tiles: (group[v], 0, n)
        ),
      ],
      scratch_shapes=[pltpu.VMEM(tuple(tile), jnp.float32)],
      out_specs=pl.BlockSpec(tuple(tile), lambda n, v, offsets, group, tiles: (tiles[v], n)),
    ),
    out_shape=varying_struct((padded.codes.shape[0], N), how.out_dtype, left.codes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(0.9 * _vmem(interpret))
    ),
    interpret=interpret,
    name="grouped_matmul_rows",
  )(offsets_E, group_V, tile_V, padded.codes, padded.scales, right.codes, scales_ESN)


def rows_kernel(
  offsets: Any,
  group: Any,
  tiles: Any,
  x_RK: Any,
  scales_RS: Any,
  w: Any,
  scales_1SC: Any,
  y_RC: Any,
  sum_RC: Any,
  *,
  axis: int,
) -> None:
  """Computes a tile for one group and writes the rows of that group."""
  visit, scale_count = pl.program_id(1), x_RK.shape[1] // LANES
  unrolled = next(count for count in (4, 3, 2, 1) if scale_count % count == 0)
  sum_RC[...] = jnp.zeros_like(sum_RC)

  def add(step: jax.Array, _: None) -> None:
    first = step * unrolled
    # the step's scales at the first lanes, where they can be read as columns
    shift = scales_RS.shape[1] - first
    scales = pltpu.roll(scales_RS[...], shift, axis=1)
    total = sum_RC[...]
    for s in range(unrolled):
      at = pl.ds(pl.multiple_of((first + s) * LANES, LANES), LANES)
      matrix = w[0, at] if axis == 0 else w[0, :, at]
      scaled = code_product(x_RK[:, at], matrix, (1, axis)) * scales[:, s : s + 1]
      total = total + scaled * scales_1SC[0, pl.ds(first + s, 1)]
    sum_RC[...] = total

  jax.lax.fori_loop(0, scale_count // unrolled, add, None)
  row_RC = jax.lax.broadcasted_iota(jnp.int32, y_RC.shape, 0) + tiles[visit] * y_RC.shape[0]
  own_RC = (row_RC >= offsets[group[visit]]) & (row_RC < offsets[group[visit] + 1])
  y_RC[...] = jnp.where(own_RC, sum_RC[...], y_RC[...].astype(jnp.float32)).astype(y_RC.dtype)


def code_product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """Contracts codes: integers in int32, then float32."""
  product = jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32,
  )
  return product.astype(jnp.float32)


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
  sizes = (LANES,) if interpret else (1024, 512, 256, 128)
  k, n = (next(size for size in sizes if axis % size == 0) for axis in (K, N))

  def rows_of(size: int, which: int) -> pl.BlockSpec:
    return pl.BlockSpec((LANES, size), lambda *at: (at[2], at[which]))

  def scales_of(size: int, which: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, size), lambda *at: (at[2], 0, at[which]))

  return pl.pallas_call(
    weights_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(K // k, N // n, segments.used),
      in_specs=[rows_of(k, 0), scales_of(k, 0), rows_of(n, 1), scales_of(n, 1)],
      out_specs=pl.BlockSpec((1, k, n), lambda i, j, s, group: (group[s], i, j)),
    ),
    out_shape=varying_struct((E, K, N), jnp.float32, left.codes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=int(0.9 * _vmem(interpret)),
    ),
    interpret=interpret,
    name="grouped_matmul_weights",
  )(
    segments.group_S,
    left.codes,
    left.scales.reshape(S, 1, K),
    right.codes,
    right.scales.reshape(S, 1, N),
  )


def weights_kernel(
  group: Any, x_BK: Any, x_scales: Any, dy_BN: Any, dy_scales: Any, dw_1KN: Any
) -> None:
  """Adds the product of one block of rows to its group's gradient."""
  block = pl.program_id(2)

  @pl.when((block == 0) | (group[block] != group[jnp.maximum(block - 1, 0)]))
  def start() -> None:
    dw_1KN[...] = jnp.zeros_like(dw_1KN)

  columns_K1 = jnp.broadcast_to(x_scales[0], (LANES, x_BK.shape[1])).T[:, :1]
  product_KN = code_product(x_BK[...], dy_BN[...], (0, 0))
  dw_1KN[0] += product_KN * columns_K1 * dy_scales[0]
