"""Rotates on TPU (Pallas Mosaic): one pass over HBM.

A block of rows stays in VMEM. The matrix unit multiplies chunks of lanes by +-1 (bfloat16 inputs
are exact, float32 ones are split in three), with the signs folded into the matrix; what is left of
a larger matrix is sums and differences of chunks in float32, 8 rows at a time in registers.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# R rows and W width (of a block: whole rows)
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct
from pallas_kernels.hadamard.blocks import LANES, SUBLANES, Plan, make_plan
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation
from pallas_kernels.hadamard.quantize_tpu import rotate_quantize
from pallas_kernels.hadamard.rotation_tpu import (
  Operands,
  combine_in_place,
  make_operands,
  rotate_chunk,
)

__all__ = ["rotate", "rotate_quantize", "unsupported"]

SLAB_ROWS = 32


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
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=plan.vmem_limit
    ),
    interpret=interpret,
    name="hadamard",
  )(operands)
  return y_RW[: x_RW.shape[0]]


def rotate_kernel(operands: Operands, out_RW: Any, y_RW: Any, *, plan: Plan) -> None:
  """Rotates a block of rows."""
  for c in range(plan.rotation.width // plan.chunk):
    lanes = pl.ds(c * plan.chunk, plan.chunk)
    y_RW[:, lanes] = rotate_chunk(operands, operands.x_RW[:, lanes], c, transposed=False)
  if plan.rotation.n > plan.chunk:
    combine_chunks(y_RW, plan)

  def store(slab: Any) -> None:
    value = y_RW[slab] * plan.factor
    if operands.signs_1W is not None:
      value = value * operands.signs_1W[...]
    out_RW[slab] = value.astype(out_RW.dtype)

  for_each_slab(plan.rows, SLAB_ROWS, store)


def combine_chunks(y_RW: Any, plan: Plan) -> None:
  """Applies the outer Kronecker factors to a block in place, a register at a time."""
  n, chunk = plan.rotation.n, plan.chunk

  def combine_rows(rows: Any) -> None:
    for start in range(0, plan.rotation.width, n):
      for offset in range(start, start + chunk, LANES):
        places = [(rows, pl.ds(offset + c * chunk, LANES)) for c in range(n // chunk)]
        combine_in_place(y_RW, places, plan.rotation.base)

  for_each_slab(plan.rows, SUBLANES, combine_rows)


def for_each_slab(rows: int, slab_rows: int, work: Any) -> None:
  """Calls `work` with the slice of every `slab_rows` rows, in a loop."""

  def body(i: jax.Array, _: None) -> None:
    work(pl.ds(pl.multiple_of(i * slab_rows, slab_rows), slab_rows))

  jax.lax.fori_loop(0, rows // slab_rows, body, None)
