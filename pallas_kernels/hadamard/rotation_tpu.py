"""Rotates what lies in VMEM: products of chunks of lanes, then sums and differences of chunks."""

# R rows, W width, S lanes of a chunk, C chunks
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.common.padding import pad_axis
from pallas_kernels.hadamard.blocks import Plan
from pallas_kernels.hadamard.matrices import conference_matrix, sylvester


class Operands(NamedTuple):
  """Holds what a kernel reads; None for what is not used."""

  x_RW: Any
  matrices_CSS: Any
  """one for all chunks, or with signs one for each"""
  same_SS: Any | None
  """1 where two lanes of a chunk belong to the same rotation, for rotations below a chunk"""
  signs_1W: Any | None
  noise_WR: Any | None
  identity_RR: Any
  """of a tile, to transpose codes; None where there are none"""


def make_operands(
  plan: Plan,
  x_RW: jax.Array,
  signs_W: jax.Array | None,
  out_signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
  identity: Any = None,
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
    identity_RR=None if identity is None else jnp.eye(plan.tile, dtype=identity),
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
    identity_RR=whole(operands.identity_RR),
  )
  return operands, blocks


def rotate_chunk(operands: Operands, x_RS: jax.Array, c: Any, transposed: bool) -> jax.Array:
  """Returns the product of a chunk of lanes with its matrix, float32 [R, S] or [S, R]."""
  matrix_SS = operands.matrices_CSS[c if operands.matrices_CSS.shape[0] > 1 else 0]

  def product(x_RS: jax.Array, matrix_SS: jax.Array) -> jax.Array:
    if transposed:
      return product_with_transpose(matrix_SS, x_RS)
    return product_with_transpose(x_RS, matrix_SS)

  if operands.same_SS is None:
    return exact_product(product, x_RS, matrix_SS)
  # A chunk holds several rotations, and 0 * NaN of one must not reach the others.
  wide_RS = x_RS.astype(jnp.float32)
  finite_RS = wide_RS - wide_RS == 0
  clean_RS = jnp.where(finite_RS, wide_RS, 0.0).astype(x_RS.dtype)
  bad_RS = jnp.where(finite_RS, 0.0, 1.0).astype(jnp.bfloat16)
  touched = product(bad_RS, operands.same_SS[...]) > 0
  return jnp.where(touched, jnp.nan, exact_product(product, clean_RS, matrix_SS))


def product_with_transpose(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a b^T in float32."""
  axes = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def exact_product(product: Any, x_RS: jax.Array, matrix_SS: jax.Array) -> jax.Array:
  """Multiplies by a matrix of signed powers of two; float32 goes in three bfloat16 parts."""
  if x_RS.dtype == jnp.bfloat16:
    return product(x_RS, matrix_SS)
  high = x_RS.astype(jnp.bfloat16)
  rest = x_RS - high.astype(jnp.float32)
  middle = rest.astype(jnp.bfloat16)
  low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
  return product(high, matrix_SS) + (product(middle, matrix_SS) + product(low, matrix_SS))


def combine_in_place(y: Any, places: list[Any], base: int) -> None:
  """Multiplies registers of y by H_base (x) H_power, where y holds products of single chunks."""
  for place, value in zip(places, combine([y[place] for place in places], base)):
    y[place] = value


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
