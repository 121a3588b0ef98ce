"""Chooses how much the TPU kernels work on at a time, from the shapes and the chip at hand."""

# R rows and W width of a block (whole rows), S lanes of a chunk
from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.padding import round_up
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation

LANES = 128
SUBLANES = 8


class Plan(NamedTuple):
  """Holds the sizes of a kernel."""

  rotation: Rotation
  rows: int
  """of a block"""
  chunk: int
  """lanes that one product rotates"""
  tile: int
  """rows and lanes that are encoded at a time"""
  vmem_limit: int
  compiled: bool
  """False in an interpreter, which is XLA"""
  casts_codes: bool
  """whether vector and matrix unit take the codes, 8-bit floats, as they are"""

  @property
  def exponent(self) -> int:
    """Returns p of the matrix's entries +-2^-p, which keep sums near the size of the input."""
    return (self.rotation.n.bit_length() - 1) // 2

  @property
  def factor(self) -> float:
    """Returns what is left of 1 / sqrt(n)."""
    return float(2**self.exponent / math.sqrt(self.rotation.n))


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
  casts = False
  if quantizer is not None and not interpret:
    floating = jnp.issubdtype(quantizer.form.dtype, jnp.floating)
    casts = floating and info.is_matmul_supported(jnp.float8_e4m3fn, jnp.float8_e4m3fn)
  return Plan(
    rotation=rotation,
    rows=rows,
    chunk=LANES if rotation.n <= LANES else min(side, rotation.power),
    tile=side if rotation.width % side == 0 else LANES,
    vmem_limit=int(0.9 * vmem),
    compiled=not interpret,
    casts_codes=casts,
  )
