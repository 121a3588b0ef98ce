"""Multiplies by packed weights on TPU (Pallas Mosaic), unpacking them in registers.

A 32-bit word holds neighbouring codes of K, low bits first. Shifting it and taking one field out of
each half gives two codes at a time; put at the top of the mantissa of 1.0 they are bfloat16
numbers, 1 + field / 2^bits, exactly, at three vector operations for 2048 weights. The matrix unit
multiplies them with X, whose columns are permuted to match, and the constants come off again with
the sum of X's columns. Codes of int3 cross words: one has ten whole ones and the first bits of an
eleventh. Trits are divided by 3 in both halves of a word at once. Where several groups share a unit
of K, X's rows are repeated with the other groups' columns zero, so that every group's product is a
row of its own to be scaled.

Values are tested in Pallas's interpreter and in the simulator of a TPU; compiled ahead of time for
v5e, v5p, v6e and tpu7x. No TPU has run it.
"""

# M rows, K inner, N outer size of a matrix, G groups of K; U units of I inner, J groups of a unit
# R rows and C columns of a tile
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
from pallas_kernels.lowbit_matmul.packing import FORMATS, Format, FormatName

LANES = 128
ONE_BITS = 0x3F803F80  # 1.0 in bfloat16, in both halves of a word
MANTISSA = 7


class Plan(NamedTuple):
  """Holds the sizes of a kernel."""

  form: Format
  inner: int
  """of a unit: K that is unpacked at a time"""
  order: tuple[int, ...]
  """which k of a unit each row of unpacked weights has; -1: none, its X is zero"""
  units: int
  group: int
  rows: int
  columns: int
  unrolled: int
  """units of a step of the loop"""
  vmem: int

  @property
  def shared(self) -> int:
    """Returns the number of groups in a unit, 1 if a group spans units."""
    return max(1, self.inner // self.group)


def unsupported(
  x_MK: jax.Array, N: int, group: int, dtype: FormatName, interpret: Any
) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  if x_MK.dtype not in (jnp.float32, jnp.bfloat16):
    return f"x.dtype={x_MK.dtype}, the kernel takes float32 and bfloat16"
  if (reason := why_no_tpu(interpret)) is not None:
    return reason
  K, inner = x_MK.shape[1], unit_size(FORMATS[dtype])
  if group < K and inner % group and group % inner:
    return f"group={group}, the kernel takes divisors and multiples of {inner}, or all of K"
  if make_plan(x_MK, N, group, dtype, interpret) is None:
    return f"x.shape={x_MK.shape}: rows of this width do not fit in VMEM"
  return None


def unit_size(form: Format) -> int:
  """Returns the K of a unit: a multiple of 128, and whole registers of words."""
  return math.lcm(LANES, math.lcm(8, form.bytes) * 4 * form.codes // form.bytes)


def make_plan(
  x_MK: jax.Array, N: int, group: int, dtype: FormatName, interpret: Any
) -> Plan | None:
  """Returns the sizes on the chip at hand; None if not even the smallest tile fits in VMEM."""
  form, (M, K) = FORMATS[dtype], x_MK.shape
  inner = unit_size(form)
  order = column_order(form, inner)
  units = -(-K // inner)
  vmem = 64 * 2**20 if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
  shared = max(1, inner // group)
  parts = 1 if x_MK.dtype == jnp.bfloat16 else 3
  for rows, columns in ((256, 512), (128, 512), (64, 512), (16, 512), (16, 256), (16, 128)):
    rows = min(rows, round_up(M, 16))
    columns = min(columns, LANES) if interpret else columns
    x_bytes = units * len(order) * shared * rows * 2 * parts
    w_bytes = units * form.bytes_of(inner) * columns + 8 * columns * max(8, K // group)
    if 2 * (x_bytes + w_bytes + 8 * rows * columns) < 0.6 * vmem:
      unrolled = next(count for count in (16, 8, 4, 2, 1) if units % count == 0)
      columns = N if N < LANES else min(columns, round_up(N, LANES))
      return Plan(form, inner, order, units, group, rows, columns, unrolled, vmem)
  return None


def multiply(
  x_MK: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  group: int,
  dtype: FormatName,
  interpret: Any,
) -> jax.Array:
  """Returns X W in float32."""
  M, N = x_MK.shape[0], packed.shape[1]
  plan = make_plan(x_MK, N, group, dtype, interpret)
  assert plan is not None, "unsupported() has let through what does not fit"
  x_UPJMI = arrange(x_MK, plan)
  packed = pad_axis(packed, plan.units * plan.form.bytes_of(plan.inner), 0)
  if interpret:  # XLA's folding of constants gives wrong numbers on CPU (jax 0.10.2)
    packed = jax.lax.optimization_barrier(packed)
  group_count = max(plan.units * plan.shared, scales_GN.shape[0]) if plan.shared > 1 else 0
  scales_GN = pad_axis(scales_GN.astype(jnp.float32), group_count, 0)
  operands = [x_UPJMI, packed, scales_GN]
  if zeros_GN is not None:
    operands.append(pad_axis(zeros_GN.astype(jnp.float32), group_count, 0))

  def columns_of(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((array.shape[0], plan.columns), lambda m, n: (0, n))

  x_block = (*x_UPJMI.shape[:3], plan.rows, len(plan.order))
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid=(x_UPJMI.shape[3] // plan.rows, pl.cdiv(N, plan.columns)),
    in_specs=[
      pl.BlockSpec(x_block, lambda m, n: (0, 0, 0, m, 0)),
      *(columns_of(array) for array in operands[1:]),
    ],
    out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda m, n: (m, n)),
    out_shape=varying_struct((x_UPJMI.shape[3], N), jnp.float32, x_MK),
    scratch_shapes=[pltpu.VMEM((plan.rows, plan.columns), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=int(0.9 * plan.vmem)
    ),
    interpret=interpret,
    name="lowbit_matmul",
  )(*operands)[:M]


def arrange(x_MK: jax.Array, plan: Plan) -> jax.Array:
  """Returns X by units, bfloat16 parts and groups of a unit: [U, P, J, M, I], columns permuted."""
  x_MK = pad_axis(pad_axis(x_MK, plan.units * plan.inner, 1), round_up(x_MK.shape[0], plan.rows), 0)
  x_MUI = x_MK.reshape(x_MK.shape[0], plan.units, plan.inner)
  group_I = np.arange(plan.inner) // plan.group if plan.shared > 1 else np.zeros(plan.inner, int)
  own_JI = group_I[None] == np.arange(plan.shared)[:, None]
  order = np.array(plan.order)
  x_UMI, own_JI = x_MUI[:, :, order].swapaxes(0, 1), own_JI[:, order] & (order >= 0)
  parts = []
  for _ in range(1 if x_MK.dtype == jnp.bfloat16 else 3):
    parts.append(x_UMI.astype(jnp.bfloat16))
    x_UMI = x_UMI - parts[-1].astype(x_UMI.dtype)
  x_UP1MI = jnp.stack(parts, axis=1)[:, :, None]
  return jnp.where(jnp.asarray(own_JI)[None, None, :, None], x_UP1MI, jnp.zeros((), jnp.bfloat16))


def column_order(form: Format, inner: int) -> tuple[int, ...]:
  """Returns which k of a unit each row of unpacked weights has, -1 for none.

  A plane has one code of each half of every word.
  """
  k = np.arange(inner)
  if form.bits == 8:
    return tuple(k.tolist())
  words = np.arange(form.bytes_of(inner) // 4)
  if form.is_digits:
    planes = [5 * (4 * words + byte) + i for byte in (0, 1) for i in range(5)]
    return tuple(int(k) for plane in planes for first in plane for k in (first, first + 10))
  if form.bits == 3:
    first = (32 * words + 2) // 3  # the first code that begins in each word
    planes = [np.stack([first + i, first + i + 1], 1) for i in range(0, 10, 2)]
    planes.append(np.stack([np.where(words % 3 < 2, first + 10, -1), 0 * words - 1], 1))
    return tuple(np.concatenate(planes).reshape(-1).tolist())
  count = 32 // form.bits
  return tuple(k.reshape(-1, 2, count // 2).transpose(2, 0, 1).reshape(-1).tolist())


def kernel(x_UPJMI: Any, packed: Any, scales: Any, *rest: Any, plan: Plan) -> None:
  """Multiplies a block of rows by a block of columns."""
  *zeros, y_RC, sum_RC = rest
  sum_RC[...] = jnp.zeros_like(sum_RC)
  bytes_of_unit = plan.form.bytes_of(plan.inner)
  if plan.form.bits == 8:
    factor, offset = 1.0, 0.0
  elif plan.form.bits == 1 or plan.form.is_digits:
    factor, offset = 4.0, 1.25  # fields 0 and 1 are -1 and 1; digits 0, 1, 2 are -1, 0, 1
  else:
    factor, offset = 2.0**plan.form.bits, 1.5

  def add_unit(unit: Any) -> None:
    place = pl.ds(pl.multiple_of(unit * bytes_of_unit, bytes_of_unit), bytes_of_unit)
    w_IC = unpack_unit(packed[place], plan.form)
    x_PJRI = x_UPJMI[unit]
    for j in range(plan.shared):
      product_RC: Any = 0.0
      sum_R1: Any = 0.0
      for part in range(x_PJRI.shape[0]):
        x_RI = x_PJRI[part, j]
        part_RC = jnp.dot(x_RI, w_IC, preferred_element_type=jnp.float32)
        part_R1 = jnp.sum(x_RI.astype(jnp.float32), axis=1, keepdims=True)
        product_RC, sum_R1 = product_RC + part_RC, sum_R1 + part_R1
      at = unit * plan.shared + j if plan.shared > 1 else unit * plan.inner // plan.group
      value_RC = factor * (product_RC - offset * sum_R1)
      for zeros_GC in zeros:
        value_RC = value_RC - zeros_GC[pl.ds(at, 1)] * sum_R1
      sum_RC[...] += value_RC * scales[pl.ds(at, 1)]

  def step(i: jax.Array, _: None) -> None:
    for unit in range(plan.unrolled):
      add_unit(i * plan.unrolled + unit)

  jax.lax.fori_loop(0, plan.units // plan.unrolled, step, None)
  y_RC[...] = sum_RC[...]


def unpack_unit(bytes_BC: jax.Array, form: Format) -> jax.Array:
  """Returns a unit of weights as bfloat16 [I, C]: 8-bit codes, else 1 + field / 2^bits.

  The field is the code and half the range, so that it is not negative.
  """
  if form.bits == 8:
    codes = pltpu.bitcast(bytes_BC, jnp.int8).astype(jnp.int32)
    return codes.astype(jnp.float32).astype(jnp.bfloat16)
  words = pltpu.bitcast(bytes_BC, jnp.int32)
  if form.is_digits or form.bits == 3:
    planes = unpack_digits(words) if form.is_digits else unpack_int3(words)
    ones = as_int32(ONE_BITS)
    return jnp.concatenate([pltpu.bitcast(plane | ones, jnp.bfloat16) for plane in planes], axis=0)
  if form.bits > 1:  # from two's complement
    words = words ^ as_int32(sum(2 ** (form.bits - 1) << i for i in range(0, 32, form.bits)))
  top = MANTISSA - form.bits
  fields = as_int32(((2**form.bits - 1) << top) * 0x10001)
  planes = []
  for plane in range(16 // form.bits):
    moved = shift_right(words, plane * form.bits - top)
    planes.append(pltpu.bitcast((moved & fields) | as_int32(ONE_BITS), jnp.bfloat16))
  return jnp.concatenate(planes, axis=0)


def unpack_int3(words_WC: jax.Array) -> list[jax.Array]:
  """Returns planes of 3-bit fields at the top of the mantissa, one in each half of a word.

  Word w begins with bit w mod 3 of a code's; of its eleventh code the rest is in the next word.
  """
  row_WC = jax.lax.broadcasted_iota(jnp.int32, words_WC.shape, 0)
  skipped_WC = row_WC - 3 * ((row_WC * 11) >> 5)  # w mod 3, for less than 32 words
  aligned_WC = jax.lax.shift_right_logical(words_WC, skipped_WC)
  top, field = MANTISSA - 3, as_int32(0b111)
  planes = []
  for i in range(0, 10, 2):
    low_WC = shift_right(aligned_WC, 3 * i - top) & (field << top)
    high_WC = shift_right(aligned_WC, 3 * (i + 1) - top - 16) & (field << (top + 16))
    planes.append(low_WC | high_WC)
  next_WC = pltpu.roll(words_WC, words_WC.shape[0] - 1, 0)
  begun_WC = jax.lax.shift_right_logical(words_WC, jnp.minimum(30 + skipped_WC, 31))
  rest_WC = jax.lax.shift_left(next_WC, 2 - skipped_WC)
  planes.append(shift_right((begun_WC | rest_WC) & field, -top))
  sign = as_int32(0b100 * 0x10001 << top)  # from two's complement
  return [plane ^ sign for plane in planes]


def unpack_digits(words_WC: jax.Array) -> list[jax.Array]:
  """Returns planes of digits to the base 3 at the top of the mantissa, one in each half of a word.

  The quotient of a byte b by 3 is 171 b / 512, rounded down.
  """
  planes = []
  for byte in (0, 1):
    values_WC = shift_right(words_WC, 8 * byte) & as_int32(0xFF00FF)
    for _ in range(5):
      quotients_WC = shift_right(values_WC * np.int32(171), 9) & as_int32(0x7F007F)
      planes.append(shift_right(values_WC - 3 * quotients_WC, 2 - MANTISSA))
      values_WC = quotients_WC
  return planes


def shift_right(words: jax.Array, count: int) -> jax.Array:
  """Returns words shifted to the right by this many bits, to the left where there are below 0."""
  if count < 0:
    return jax.lax.shift_left(words, np.int32(-count))
  return jax.lax.shift_right_logical(words, np.int32(count))


def as_int32(bits: int) -> np.int32:
  """Returns 32 bits as an integer."""
  return np.uint32(bits).view(np.int32)
