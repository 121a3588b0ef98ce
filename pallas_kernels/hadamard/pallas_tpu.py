"""Rotates and quantises on TPU (Pallas Mosaic): one pass over HBM.

A block of rows stays in VMEM. The matrix unit multiplies chunks of lanes by +-1 (bfloat16 inputs
are exact, float32 ones are split in three), with the signs folded into the matrix; what is left of
a larger matrix is sums and differences of chunks in float32, 8 rows at a time in registers. The
largest |y| or the mean square of every group is collected along the lanes, scales are made of it
for the whole block at once, and written with rows along the lanes.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# R rows and W width (of a block: whole rows), G groups of a row, S lanes of a chunk, C chunks
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation, conference_matrix, sylvester

LANES = 128
SUBLANES = 8
SLAB_ROWS = 32  # a tile of 8-bit codes


class Plan(NamedTuple):
  """Holds the sizes of a kernel."""

  rotation: Rotation
  rows: int
  chunk: int
  """lanes that one product rotates"""
  tile: int
  """rows and lanes that are encoded at a time"""
  vmem_limit: int
  compiled: bool
  """False in an interpreter, which is XLA"""
  multiplies_codes: bool
  """whether the matrix unit takes the codes, 8-bit floats, as they are"""

  @property
  def exponent(self) -> int:
    """Returns p of the matrix's entries +-2^-p, which keep sums near the size of the input."""
    return (self.rotation.n.bit_length() - 1) // 2

  @property
  def factor(self) -> float:
    """Returns what is left of 1 / sqrt(n)."""
    return float(2**self.exponent / math.sqrt(self.rotation.n))


class Operands(NamedTuple):
  """Holds what a kernel reads; None for what is not used."""

  x_RW: Any
  matrices_CSS: Any
  same_SS: Any | None
  """1 where two lanes of a chunk belong to the same rotation, for rotations below a chunk"""
  signs_1W: Any | None
  noise_WR: Any | None


class Quantized(NamedTuple):
  """Holds the blocks of codes, scales with rows along the lanes, and the trust mask."""

  codes_RW: Any
  scales_GR: Any
  mask_RW: Any | None


class Scratch(NamedTuple):
  """Holds the rotated block, float32, and a number for each row and group along the lanes."""

  y_WR: Any
  groups_GR: Any


def unsupported(
  x_RW: jax.Array, rotation: Rotation, quantizer: Quantizer | None, interpret: Any
) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  if x_RW.dtype not in (jnp.float32, jnp.bfloat16):
    return f"x.dtype={x_RW.dtype}, the kernel takes float32 and bfloat16"
  if (reason := why_no_tpu(interpret)) is not None:
    return reason
  if rotation.width % LANES or rotation.power % min(LANES, rotation.n):
    return (
      f"the last axis of x, {rotation.width}, must be a multiple of {LANES}, and the power of two "
      f"in the order {rotation.n} at least {LANES} beside base={rotation.base}"
    )
  if quantizer is not None and quantizer.group % LANES:
    return f"group={quantizer.group}, the kernel takes multiples of {LANES}"
  if quantizer is not None and quantizer.format == "mxfp4":
    return "dtype='mxfp4', its vector unit has no 4-bit floats"
  if make_plan(x_RW, rotation, quantizer, interpret) is None:
    return f"the last axis of x, {rotation.width}: 128 rows of this width do not fit in VMEM"
  return None


def make_plan(
  x_RW: jax.Array, rotation: Rotation, quantizer: Quantizer | None, interpret: Any
) -> Plan | None:
  """Returns the sizes on the chip at hand; None if not even 128 rows fit in VMEM."""
  if interpret:
    side, vmem, most = LANES, 64 * 2**20, LANES
  else:
    info = pltpu.get_tpu_info()
    side, vmem, most = info.mxu_column_size, info.vmem_capacity_bytes, 512
  # two buffers of what is read and written; the rotated block
  buffers = x_RW.dtype.itemsize
  if quantizer is None:
    buffers += x_RW.dtype.itemsize
  else:
    buffers += 1 + (quantizer.scale == "quest") + 4 * quantizer.stochastic
  per_row = rotation.width * (2 * buffers + 4)
  rows = most
  while rows > LANES and rows * per_row > 0.6 * vmem:
    rows //= 2
  if rows * per_row > 0.85 * vmem:
    return None
  rows = min(rows, round_up(max(1, x_RW.shape[0]), LANES))
  chunk = LANES if rotation.n <= LANES else min(side, rotation.power)
  tile = side if rotation.width % side == 0 else LANES
  native = False
  if quantizer is not None and not interpret:
    dtype = quantizer.form.dtype
    native = jnp.issubdtype(dtype, jnp.floating) and info.is_matmul_supported(dtype, dtype)
  return Plan(rotation, rows, chunk, tile, int(0.9 * vmem), not interpret, native)


def make_operands(
  plan: Plan,
  x_RW: jax.Array,
  signs_W: jax.Array | None,
  out_signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
) -> tuple[Operands, Operands]:
  """Returns the operands and their blocks."""
  rotation, chunk, rows = plan.rotation, plan.chunk, plan.rows
  n = min(rotation.n, chunk)
  alone = np.kron(np.eye(chunk // n), sylvester(n)) * 2.0**-plan.exponent
  matrices_CSS = jnp.asarray(alone, jnp.bfloat16)[None]
  if signs_W is not None:
    matrices_CSS = matrices_CSS * signs_W.astype(jnp.bfloat16).reshape(-1, 1, chunk)
  same = np.kron(np.eye(chunk // n), np.ones((n, n))) if n < chunk else None
  operands = Operands(
    x_RW=pad_axis(x_RW, rows, 0),
    matrices_CSS=matrices_CSS,
    same_SS=None if same is None else jnp.asarray(same, jnp.bfloat16),
    signs_1W=None if out_signs_W is None else out_signs_W.astype(jnp.float32)[None],
    noise_WR=None if noise_RW is None else pad_axis(noise_RW, rows, 0).T,
  )
  row_block = pl.BlockSpec((rows, rotation.width), lambda r: (r, 0))

  def whole(array: jax.Array | None) -> pl.BlockSpec | None:
    return None if array is None else pl.BlockSpec(array.shape, lambda r: (0,) * array.ndim)

  blocks = Operands(
    x_RW=row_block,
    matrices_CSS=whole(operands.matrices_CSS),
    same_SS=whole(operands.same_SS),
    signs_1W=whole(operands.signs_1W),
    noise_WR=None if noise_RW is None else pl.BlockSpec((rotation.width, rows), lambda r: (0, r)),
  )
  return operands, blocks


def compiler_params(plan: Plan) -> pltpu.CompilerParams:
  """Returns the kernels' parameters: blocks of rows on all cores."""
  return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=plan.vmem_limit)


def rotate(
  x_RW: jax.Array,
  rotation: Rotation,
  signs_W: jax.Array | None,
  out_signs_W: jax.Array | None,
  interpret: Any = False,
) -> jax.Array:
  """Returns (x . signs) H / sqrt(n) . out_signs, in x's dtype."""
  plan = make_plan(x_RW, rotation, None, interpret)
  assert plan is not None, "unsupported() has let through what does not fit"
  operands, blocks = make_operands(plan, x_RW, signs_W, out_signs_W, None)
  y_RW = pl.pallas_call(
    functools.partial(rotate_kernel, plan=plan),
    grid=(pl.cdiv(operands.x_RW.shape[0], plan.rows),),
    in_specs=(blocks,),
    out_specs=blocks.x_RW,
    out_shape=varying_struct(operands.x_RW.shape, x_RW.dtype, x_RW),
    scratch_shapes=(pltpu.VMEM((plan.rows, rotation.width), jnp.float32),),
    compiler_params=compiler_params(plan),
    interpret=interpret,
    name="hadamard",
  )(operands)
  return y_RW[: x_RW.shape[0]]


def rotate_kernel(operands: Operands, out_RW: Any, y_RW: Any, *, plan: Plan) -> None:
  """Rotates a block of rows."""
  multiply_chunks(operands, y_RW, plan, transposed=False)
  combine_chunks(y_RW, plan, transposed=False)

  def store(slab: Any) -> None:
    value = y_RW[slab] * plan.factor
    if operands.signs_1W is not None:
      value = value * operands.signs_1W[...]
    out_RW[slab] = value.astype(out_RW.dtype)

  for_each_slab(plan.rows, SLAB_ROWS, store)


def rotate_quantize(
  x_RW: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer,
  signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes [R, W], scales [R, W / group] and, for "quest", the trust mask, int8 [R, W]."""
  plan = make_plan(x_RW, rotation, quantizer, interpret)
  assert plan is not None, "unsupported() has let through what does not fit"
  operands, blocks = make_operands(plan, x_RW, signs_W, None, noise_RW)
  (R, W), G = operands.x_RW.shape, rotation.width // quantizer.group
  trusting = quantizer.scale == "quest"
  out_blocks = Quantized(
    codes_RW=blocks.x_RW,
    scales_GR=pl.BlockSpec((G, plan.rows), lambda r: (0, r)),
    mask_RW=blocks.x_RW if trusting else None,
  )
  out_shape = Quantized(
    codes_RW=varying_struct((R, W), quantizer.form.dtype, x_RW),
    scales_GR=varying_struct((G, R), jnp.float32, x_RW),
    mask_RW=varying_struct((R, W), jnp.int8, x_RW) if trusting else None,
  )
  (out,) = pl.pallas_call(
    functools.partial(rotate_quantize_kernel, plan=plan, quantizer=quantizer),
    grid=(pl.cdiv(R, plan.rows),),
    in_specs=(blocks,),
    out_specs=(out_blocks,),
    out_shape=(out_shape,),
    scratch_shapes=(
      Scratch(
        pltpu.VMEM((W, plan.rows), jnp.float32),
        pltpu.VMEM((G, plan.rows), jnp.float32),
      ),
    ),
    compiler_params=compiler_params(plan),
    interpret=interpret,
    name="hadamard_quantize",
  )(operands)
  rows = x_RW.shape[0]
  mask_RW = None if out.mask_RW is None else out.mask_RW[:rows]
  return out.codes_RW[:rows], out.scales_GR.T[:rows], mask_RW


def rotate_quantize_kernel(
  operands: Operands, out: Quantized, scratch: Scratch, *, plan: Plan, quantizer: Quantizer
) -> None:
  """Rotates a block of rows and quantises it."""
  group = quantizer.group
  G = plan.rotation.width // group
  multiply_chunks(operands, scratch.y_WR, plan, transposed=True)
  combine_chunks(scratch.y_WR, plan, transposed=True)
  for g in range(G):
    y_IR = scratch.y_WR[pl.ds(g * group, group)]
    if quantizer.scale == "absmax" and plan.rotation.n % group == 0:
      # All of a group is NaN or none, so that no maximum can lose it; four operations become two.
      magnitudes = [jnp.abs(y_IR[i : i + SUBLANES]) for i in range(0, group, SUBLANES)]
      y_IR = functools.reduce(jnp.maximum, magnitudes)
    scratch.groups_GR[pl.ds(g, 1)] = codes.statistic(y_IR, quantizer, axis=0)
  power = 2 if quantizer.scale == "quest" else 1
  scales_GR = codes.scale_of_statistic(scratch.groups_GR[...] * plan.factor**power, quantizer)
  out.scales_GR[...] = scales_GR
  # 0 marks groups that hold NaN or infinity: their codes do not matter, but must not reach others'
  scratch.groups_GR[...] = jnp.where(scales_GR - scales_GR == 0, plan.factor / scales_GR, 0.0)
  tile, rows = plan.tile, plan.tile if plan.rows % plan.tile == 0 else LANES
  for lane in range(0, plan.rotation.width, tile):
    for row in range(0, plan.rows, rows):
      encode_tile(operands, out, scratch, (row, rows, lane, tile), quantizer, plan)


def encode_tile(
  operands: Operands,
  out: Quantized,
  scratch: Scratch,
  place: tuple[int, int, int, int],
  quantizer: Quantizer,
  plan: Plan,
) -> None:
  """Encodes the tile at (row, rows, lane, lanes) of a block, and turns it back to [R, W]."""
  row, rows, lane, lanes = place
  at_rows, at_lanes = pl.ds(row, rows), pl.ds(lane, lanes)
  rounded, trusted = [], []
  piece = math.gcd(quantizer.group, lanes)
  for start in range(lane, lane + lanes, piece):
    inverse_1R = scratch.groups_GR[pl.ds(start // quantizer.group, 1), at_rows]
    ratio_IR = scratch.y_WR[pl.ds(start, piece), at_rows] * inverse_1R
    ratio_IR = jnp.where(inverse_1R == 0, 0.0, ratio_IR)
    noise = operands.noise_WR
    noise_IR = None if noise is None else noise[pl.ds(start, piece), at_rows]
    if plan.multiplies_codes and noise is None:
      rounded.append(ratio_IR.astype(quantizer.form.dtype))
    else:
      rounded_IR = codes.round_to_codes(ratio_IR, quantizer, noise_IR, plan.compiled)
      rounded.append(rounded_IR.astype(jnp.bfloat16))
    if out.mask_RW is not None:
      trust_IR = codes.is_trusted(ratio_IR, quantizer)
      trusted.append(jnp.where(trust_IR, 1.0, 0.0).astype(jnp.bfloat16))
  # A product with the identity transposes what bfloat16, or the chip's 8-bit float, holds exactly.
  identity = jnp.eye(rows, dtype=jnp.float32)
  rounded_SR = jnp.concatenate(rounded, axis=0)
  rounded_RS = product_with_transpose(identity.astype(rounded_SR.dtype), rounded_SR)
  out.codes_RW[at_rows, at_lanes] = codes.cast(rounded_RS, quantizer.form.dtype)
  if out.mask_RW is not None:
    trusted_RS = product_with_transpose(
      identity.astype(jnp.bfloat16), jnp.concatenate(trusted, axis=0)
    )
    out.mask_RW[at_rows, at_lanes] = codes.cast(trusted_RS, jnp.int8)


def product_with_transpose(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a b^T in float32."""
  axes = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def multiply_chunks(operands: Operands, y: Any, plan: Plan, transposed: bool) -> None:
  """Writes the product of every chunk of lanes with its matrix, as [R, W] or [W, R]."""
  for c in range(plan.rotation.width // plan.chunk):
    lanes = pl.ds(c * plan.chunk, plan.chunk)
    x_RS = operands.x_RW[:, lanes]
    matrix_SS = operands.matrices_CSS[c if operands.matrices_CSS.shape[0] > 1 else 0]

    def product(x_RS: jax.Array, matrix_SS: jax.Array) -> jax.Array:
      if transposed:
        return product_with_transpose(matrix_SS, x_RS)
      return product_with_transpose(x_RS, matrix_SS)

    at = (lanes, slice(None)) if transposed else (slice(None), lanes)
    if operands.same_SS is None:
      y[at] = exact_product(product, x_RS, matrix_SS)
      continue
    # A chunk holds several rotations, and 0 * NaN of one must not reach the others.
    wide_RS = x_RS.astype(jnp.float32)
    finite_RS = wide_RS - wide_RS == 0
    clean_RS = jnp.where(finite_RS, wide_RS, 0.0).astype(x_RS.dtype)
    bad_RS = jnp.where(finite_RS, 0.0, 1.0).astype(jnp.bfloat16)
    touched = product(bad_RS, operands.same_SS[...]) > 0
    y[at] = jnp.where(touched, jnp.nan, exact_product(product, clean_RS, matrix_SS))


def exact_product(product: Any, x_RS: jax.Array, matrix_SS: jax.Array) -> jax.Array:
  """Multiplies by a matrix of signed powers of two; float32 goes in three bfloat16 parts."""
  if x_RS.dtype == jnp.bfloat16:
    return product(x_RS, matrix_SS)
  high = x_RS.astype(jnp.bfloat16)
  rest = x_RS - high.astype(jnp.float32)
  middle = rest.astype(jnp.bfloat16)
  low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
  return product(high, matrix_SS) + (product(middle, matrix_SS) + product(low, matrix_SS))


def combine_chunks(y: Any, plan: Plan, transposed: bool) -> None:
  """Applies the outer Kronecker factors in place to y [R, W] or [W, R], a register at a time."""
  rotation, chunk = plan.rotation, plan.chunk
  if rotation.n == chunk or rotation.n < LANES:
    return
  step = SUBLANES if transposed else LANES

  def at(position: Any, row: Any) -> tuple[Any, Any]:
    return (pl.ds(position, step), row) if transposed else (row, pl.ds(position, step))

  def combine_at(offset: Any, row: Any) -> None:
    for start in range(0, rotation.width, rotation.n):
      places = [start + i * chunk + offset for i in range(rotation.n // chunk)]
      values = combine([y[at(place, row)] for place in places], rotation.base)
      for place, value in zip(places, values):
        y[at(place, row)] = value

  if transposed:

    def of_sublanes(i: jax.Array, _: None) -> None:
      for row in range(0, plan.rows, LANES):
        combine_at(pl.multiple_of(i * SUBLANES, SUBLANES), pl.ds(row, LANES))

    jax.lax.fori_loop(0, chunk // SUBLANES, of_sublanes, None)
  else:

    def of_rows(i: jax.Array, _: None) -> None:
      for offset in range(0, chunk, LANES):
        combine_at(offset, pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES))

    jax.lax.fori_loop(0, plan.rows // SUBLANES, of_rows, None)


def combine(values: list[jax.Array], base: int) -> list[jax.Array]:
  """Multiplies a list of arrays by H_base (x) H_power, by sums and differences."""
  half = 1
  while half < len(values) // base:
    mixed = list(values)
    for i in range(len(values)):
      if not i & half:  # within a power of two, as `half` stays below it
        mixed[i], mixed[i + half] = values[i] + values[i + half], values[i] - values[i + half]
    values, half = mixed, 2 * half
  if base == 1:
    return values
  power = len(values) // base
  columns = [combine_base(values[i::power], base) for i in range(power)]
  return [columns[i % power][i // power] for i in range(len(values))]


def combine_base(values: list[jax.Array], base: int) -> list[jax.Array]:
  """Multiplies a list of arrays by `base_matrix(base)`, whose blocks of 2 x 2 halve the sums."""
  if base == 40:
    first, second = values[:20], values[20:]
    sums = combine_base([a + b for a, b in zip(first, second)], 20)
    return sums + combine_base([a - b for a, b in zip(first, second)], 20)
  sums = [a + b for a, b in zip(values[::2], values[1::2])]
  differences = [a - b for a, b in zip(values[::2], values[1::2])]
  results: list[jax.Array] = []
  for i, row in enumerate(conference_matrix(base // 2 - 1)):
    even, odd = differences[i], -sums[i]
    for sign, total, difference in zip(row, sums, differences):
      if sign > 0:
        even, odd = even + total, odd + difference
      elif sign < 0:
        even, odd = even - total, odd - difference
    results += [even, odd]
  return results


def for_each_slab(rows: int, slab_rows: int, work: Any) -> None:
  """Calls `work` with the slice of every `slab_rows` rows, in a loop."""

  def body(i: jax.Array, _: None) -> None:
    work(pl.ds(pl.multiple_of(i * slab_rows, slab_rows), slab_rows))

  jax.lax.fori_loop(0, rows // slab_rows, body, None)
