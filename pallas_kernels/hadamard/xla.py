"""Rotates by one product for each Kronecker factor of the matrix, in float32 in between."""

# R rows, W width of the rotated axis
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation, base_matrix, sylvester
from pallas_kernels.hadamard.reference import widen

LARGEST_FACTOR = 128


def rotate(
  x_RW: jax.Array, rotation: Rotation, signs_W: jax.Array | None, out_signs_W: jax.Array | None
) -> jax.Array:
  """Returns (x . signs) H / sqrt(n) . out_signs, in x's dtype; computed in float32 or wider."""
  y_RW = rotate_wide(x_RW, rotation, signs_W)
  if out_signs_W is not None:
    y_RW = y_RW * out_signs_W.astype(y_RW.dtype)[None]
  return y_RW.astype(x_RW.dtype)


def rotate_wide(x_RW: jax.Array, rotation: Rotation, signs_W: jax.Array | None) -> jax.Array:
  """Returns (x . signs) H / sqrt(n) in float32, or in float64 for float64 inputs."""
  x_RW = widen(x_RW, signs_W)
  R, W = x_RW.shape
  inner = 1
  for matrix in reversed(factors(rotation)):
    size = len(matrix)
    blocks = x_RW.reshape(R, W // (size * inner), size, inner)
    product = jnp.einsum(
      "rnai,ab->rnbi",
      blocks,
      jnp.asarray(matrix, x_RW.dtype),
      precision=jax.lax.Precision.HIGHEST,
    )
    x_RW, inner = product.reshape(R, W), inner * size
  return x_RW * (1 / math.sqrt(rotation.n))


def factors(rotation: Rotation) -> list[np.ndarray]:
  """Returns the Kronecker factors, outermost first; powers of two in nearly equal parts."""
  exponent = rotation.power.bit_length() - 1
  parts = max(1, -(-exponent // (LARGEST_FACTOR.bit_length() - 1)))
  sizes = [2 ** (exponent // parts + (i < exponent % parts)) for i in range(parts)]
  outer = [] if rotation.base == 1 else [base_matrix(rotation.base)]
  return outer + [sylvester(size) for size in sizes if size > 1]


def rotate_quantize(
  x_RW: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer,
  signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes [R, W], scales [R, W / group] and, for "quest", the trust mask, int8 [R, W]."""
  return codes.quantize(rotate_wide(x_RW, rotation, signs_W), quantizer, noise_RW)
