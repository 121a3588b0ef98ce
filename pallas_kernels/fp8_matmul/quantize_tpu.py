"""Quantises on TPU in one pass: reads X once, writes codes and scales.

Scales lie along the lanes: tiles along rows are transposed before, by a product with the identity
on the matrix unit, which is exact and leaves the vector unit free. So codes of tiles along rows
leave the kernel transposed, [N, M], and with `transposed` those of tiles along columns, too: the
orientations in which `pallas_tpu` multiplies them; a zero may lose its sign on the way. Tiles along
columns in 8-bit floats are transposed as codes where the matrix unit is 256 wide, which saves the
vector unit a second cast; in squares it would keep the cross-lane units from the maxima.
"""

# M rows, N columns
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.fp8_matmul import blocks
from pallas_kernels.fp8_matmul.blocks import LANES
from pallas_kernels.fp8_matmul.codes import (
  Format,
  Quantized,
  encode,
  largest_magnitude,
  scale_of_block,
)

STRIP = 512
"""Columns of a product with the identity."""


def quantize(
  x_MN: jax.Array,
  block: tuple[int, int],
  form: Format,
  mode: str,
  interpret: Any = False,
  transposed: bool = False,
) -> Quantized:
  """Returns codes [M, N], in memory [N, M] if `transposed` or for tiles along rows, and scales."""
  (M, N), size = x_MN.shape, max(block)
  chip = blocks.core(interpret)
  if x_MN.dtype not in (jnp.float32, jnp.bfloat16):
    x_MN = x_MN.astype(jnp.float32)
  rows, columns = blocks.quantizer_tile(M, N, size, chip)
  tiles = pl.cdiv(M, rows), pl.cdiv(N, columns)
  x_MN = pad_axis(pad_axis(x_MN, tiles[0] * rows, 0), tiles[1] * columns, 1)
  transposed = transposed or block[0] == 1
  turn = block[1] == 1 and form.dtype != jnp.int8 and bool(interpret or chip.mxu_side > LANES)
  how = Recipe(size, form, mode, transposed, turn, by_xla=bool(interpret))
  body: Any
  scales: tuple[int, ...]
  if block[0] == 1:
    body, scales = _along_rows, (tiles[1], columns // size, tiles[0] * rows)
    scales_block = pl.BlockSpec((None, columns // size, rows), lambda m, n: (n, 0, m))
  elif block[1] == 1:
    body, scales = _along_columns, (tiles[0], rows // size, tiles[1] * columns)
    scales_block = pl.BlockSpec((None, rows // size, columns), lambda m, n: (m, 0, n))
  else:
    body, scales = _in_squares, (*tiles, rows // size, columns // size)
    scales_block = pl.BlockSpec((None, None, *scales[2:]), lambda m, n: (m, n, 0, 0))
  shape = (tiles[0] * rows, tiles[1] * columns)
  codes_block = pl.BlockSpec((rows, columns), lambda m, n: (m, n))
  if transposed:
    shape = shape[::-1]
    codes_block = pl.BlockSpec((columns, rows), lambda m, n: (n, m))
  eye_dtype = x_MN.dtype if block[0] == 1 else form.dtype
  codes, scales_out = pl.pallas_call(
    functools.partial(body, how=how),
    grid=tiles,
    in_specs=[
      pl.BlockSpec((rows, columns), lambda m, n: (m, n)),
      pl.BlockSpec((LANES, LANES), lambda m, n: (0, 0)),
    ],
    out_specs=[codes_block, scales_block],
    out_shape=[
      varying_struct(shape, form.dtype, x_MN),
      varying_struct(scales, jnp.float32, x_MN),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"),
      vmem_limit_bytes=int(0.9 * chip.vmem),
    ),
    interpret=interpret,
    name="quantize",
  )(x_MN, jnp.eye(LANES, dtype=eye_dtype))
  codes = codes.T if transposed else codes
  if block[0] == 1:
    scales_out = scales_out.reshape(-1, scales[2]).T
  elif block[1] == 1:
    scales_out = scales_out.reshape(-1, scales[2])
  else:
    scales_out = scales_out.transpose(0, 2, 1, 3).reshape(tiles[0] * scales[2], -1)
  return Quantized(codes[:M, :N], scales_out[: pl.cdiv(M, block[0]), : pl.cdiv(N, block[1])])


class Recipe(NamedTuple):
  """Holds what a quantiser's body needs to know."""

  size: int
  form: Format
  mode: str
  transposed: bool
  turn: bool
  """Whether codes are transposed as they are, not by a product with the identity."""
  by_xla: bool

  def scale(self, amax: jax.Array) -> jax.Array:
    """Returns the scales of blocks."""
    return scale_of_block(amax, self.form.largest, self.mode)

  def encode(self, tile: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the codes of a tile."""
    return encode(tile, scale, self.form, self.by_xla)


def _along_rows(x: Any, eye: Any, codes: Any, scales: Any, *, how: Recipe) -> None:
  """Quantises tiles of `size` numbers of a row."""
  (rows, columns), size = x.shape, how.size
  for n in range(0, columns, size):
    for m in range(0, rows, STRIP):
      strip = slice(m, min(m + STRIP, rows))
      parts = [transpose(eye, x[strip, at : at + LANES]) for at in range(n, n + size, LANES)]
      tile = jnp.concatenate(parts, axis=0)
      scale = how.scale(largest_magnitude(tile, 0, keepdims=True))
      scales[n // size : n // size + 1, strip] = scale
      codes[n : n + size, strip] = how.encode(tile, scale)


def _along_columns(x: Any, eye: Any, codes: Any, scales: Any, *, how: Recipe) -> None:
  """Quantises tiles of `size` numbers of a column."""
  (rows, columns), size = x.shape, how.size
  for m in range(0, rows, size):
    for n in range(0, columns, LANES):
      strip = slice(n, n + LANES)
      tile = x[m : m + size, strip].astype(jnp.float32)
      scale = how.scale(largest_magnitude(tile, 0, keepdims=True))
      scales[m // size : m // size + 1, strip] = scale
      write_codes(codes, eye, tile, scale, (m, n), how)


def _in_squares(x: Any, eye: Any, codes: Any, scales: Any, *, how: Recipe) -> None:
  """Quantises squares of `size` x `size` numbers."""
  (rows, columns), size = x.shape, how.size
  for m in range(0, rows, size):
    for n in range(0, columns, size):
      tile = x[m : m + size, n : n + size].astype(jnp.float32)
      amax = largest_magnitude(largest_magnitude(tile, 0, keepdims=True), 1, keepdims=True)
      scale = how.scale(amax)
      scales[m // size : m // size + 1, n // size : n // size + 1] = scale
      for at in range(0, size, LANES):
        part = tile[:, at : at + LANES]
        write_codes(codes, eye, part, scale, (m, n + at), how)


def write_codes(
  codes: Any, eye: Any, tile: jax.Array, scale: jax.Array, at: tuple[int, int], how: Recipe
) -> None:
  """Writes the codes of a tile of 128 columns as they are or transposed."""
  (m, n), rows = at, tile.shape[0]
  if not how.transposed:
    codes[m : m + rows, n : n + LANES] = how.encode(tile, scale)
    return
  if how.turn:
    codes[n : n + LANES, m : m + rows] = how.encode(tile, scale).T
    return
  # The scale says where numbers are not finite: NaN times 0 would reach other columns' codes.
  coded = how.encode(jnp.where(scale < jnp.inf, tile, 0.0), scale)
  codes[n : n + LANES, m : m + rows] = transpose(eye, coded).astype(how.form.dtype)


def transpose(eye: Any, tile: jax.Array) -> jax.Array:
  """Returns the transpose of [rows, 128] in float32; of codes in the type of their sums."""
  if tile.dtype == jnp.float32:
    return tile.T
  total = jnp.int32 if tile.dtype == jnp.int8 else jnp.float32
  axes = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(eye[...], tile, axes, preferred_element_type=total)
