"""Rotates and quantises on TPU (Pallas Mosaic): one pass over HBM.

The matrix unit gives the rotated numbers of a block of rows transposed: a group's numbers lie along
the sublanes, where their maximum costs no shuffle and their scale no broadcast. A second product,
with the identity, turns the codes back.
"""

# R rows and W lanes of a block, G groups of a row, I numbers of a group, S lanes of a tile
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.shards import varying_struct
from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.blocks import LANES, SUBLANES, Plan, make_plan
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation
from pallas_kernels.hadamard.rotation_tpu import (
  Operands,
  combine_in_place,
  make_operands,
  product_with_transpose,
  rotate_chunk,
)


class Quantized(NamedTuple):
  """Holds the blocks of codes, scales with rows along the lanes, and the trust mask."""

  codes_RW: Any
  scales_GR: Any
  mask_RW: Any | None


class Scratch(NamedTuple):
  """Holds the rotated block, float32, and a number for each row and group along the lanes."""

  y_WR: Any
  groups_GR: Any


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
  identity = quantizer.form.dtype if plan.casts_codes and noise_RW is None else jnp.bfloat16
  operands, blocks = make_operands(plan, x_RW, signs_W, None, noise_RW, identity)
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
  scratch = Scratch(
    pltpu.VMEM((W, plan.rows), jnp.float32), pltpu.VMEM((G, plan.rows), jnp.float32)
  )
  (out,) = pl.pallas_call(
    functools.partial(rotate_quantize_kernel, plan=plan, quantizer=quantizer),
    grid=(pl.cdiv(R, plan.rows),),
    in_specs=(blocks,),
    out_specs=(out_blocks,),
    out_shape=(out_shape,),
    scratch_shapes=(scratch,),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),
      vmem_limit_bytes=plan.vmem_limit,
    ),
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
  rotate_block(operands, scratch.y_WR, plan)
  write_scales(out, scratch, plan, quantizer)
  rows = plan.tile if plan.rows % plan.tile == 0 else LANES
  for lane in range(0, plan.rotation.width, plan.tile):
    for row in range(0, plan.rows, rows):
      encode_tile(operands, out, scratch, (row, rows, lane, plan.tile), quantizer, plan)


def rotate_block(operands: Operands, y_WR: Any, plan: Plan) -> None:
  """Writes the rotated rows of a block, transposed."""
  rotation, chunk = plan.rotation, plan.chunk
  for c in range(rotation.width // chunk):
    lanes = pl.ds(c * chunk, chunk)
    y_WR[lanes] = rotate_chunk(operands, operands.x_RW[:, lanes], c, transposed=True)

  def combine(i: jax.Array, _: None) -> None:
    offset = pl.multiple_of(i * SUBLANES, SUBLANES)
    for start in range(0, rotation.width, rotation.n):
      for row in range(0, plan.rows, LANES):
        firsts = range(start, start + rotation.n, chunk)
        places = [(pl.ds(first + offset, SUBLANES), pl.ds(row, LANES)) for first in firsts]
        combine_in_place(y_WR, places, rotation.base)

  if rotation.n > chunk:
    jax.lax.fori_loop(0, chunk // SUBLANES, combine, None)


def write_scales(out: Quantized, scratch: Scratch, plan: Plan, quantizer: Quantizer) -> None:
  """Writes the scales of all groups of a block, and keeps what their numbers are multiplied by."""
  group = quantizer.group
  for g in range(plan.rotation.width // group):
    y_IR = scratch.y_WR[pl.ds(g * group, group)]
    if quantizer.scale == "absmax" and plan.rotation.n % group == 0:
      # All of a group is NaN or none, so that no maximum can lose it; four operations become two.
      magnitudes = [jnp.abs(y_IR[i : i + SUBLANES]) for i in range(0, group, SUBLANES)]
      y_IR = functools.reduce(jnp.maximum, magnitudes)
    scratch.groups_GR[pl.ds(g, 1)] = codes.statistic(y_IR, quantizer, axis=0)
  power = 2 if quantizer.scale == "quest" else 1
  scales_GR = codes.scale_of_statistic(scratch.groups_GR[...] * plan.factor**power, quantizer)
  out.scales_GR[...] = scales_GR
  # 0 marks groups that hold NaN or infinity: their codes must not reach others'
  scratch.groups_GR[...] = jnp.where(scales_GR - scales_GR == 0, plan.factor / scales_GR, 0.0)


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
  dtype, noise = quantizer.form.dtype, operands.noise_WR
  encoded, trusted = [], []
  piece = math.gcd(quantizer.group, lanes)
  for start in range(lane, lane + lanes, piece):
    inverse_1R = scratch.groups_GR[pl.ds(start // quantizer.group, 1), at_rows]
    ratio_IR = scratch.y_WR[pl.ds(start, piece), at_rows] * inverse_1R
    noise_IR = None if noise is None else noise[pl.ds(start, piece), at_rows]
    if plan.casts_codes and noise is None:
      encoded.append(jnp.where(inverse_1R == 0, 0.0, ratio_IR).astype(dtype))
    else:
      encoded.append(codes.to_carrier(ratio_IR, inverse_1R, quantizer, noise_IR, plan.compiled))
    if out.mask_RW is not None:
      trusted.append(jnp.where(codes.is_trusted(ratio_IR, quantizer), 1.0, 0.0))
  # A product with the identity transposes what bfloat16, or the chip's 8-bit float, holds exactly.
  identity_RR = operands.identity_RR[:rows, :rows]
  encoded_SR = jnp.concatenate(encoded, axis=0)
  encoded_RS = product_with_transpose(identity_RR.astype(encoded_SR.dtype), encoded_SR)
  cast = encoded_SR.dtype == dtype
  out.codes_RW[at_rows, at_lanes] = (
    encoded_RS.astype(dtype) if cast else codes.from_carrier(encoded_RS, dtype)
  )
  if out.mask_RW is not None:
    trusted_SR = jnp.concatenate(trusted, axis=0).astype(jnp.bfloat16)
    trusted_RS = product_with_transpose(identity_RR.astype(jnp.bfloat16), trusted_SR)
    out.mask_RW[at_rows, at_lanes] = trusted_RS.astype(jnp.int8)
