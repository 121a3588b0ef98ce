"""Rotates by butterflies in float32 and quantises group by group; others are compared with it."""

# R rows, W width of the rotated axis
from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation, base_matrix


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
  half = 1
  while half < rotation.power:
    pairs = x_RW.reshape(R, W // (2 * half), 2, half)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    x_RW = jnp.stack([first + second, first - second], axis=2).reshape(R, W)
    half *= 2
  if rotation.base > 1:
    matrix = jnp.asarray(base_matrix(rotation.base), x_RW.dtype)
    blocks = x_RW.reshape(R, W // rotation.n, rotation.base, rotation.power)
    product = jnp.einsum("rnap,ab->rnbp", blocks, matrix, precision=jax.lax.Precision.HIGHEST)
    x_RW = product.reshape(R, W)
  return x_RW * (1 / math.sqrt(rotation.n))


def widen(x_RW: jax.Array, signs_W: jax.Array | None) -> jax.Array:
  """Returns x . signs in float32, or in float64 for float64 inputs."""
  x_RW = x_RW.astype(jnp.promote_types(x_RW.dtype, jnp.float32))
  return x_RW if signs_W is None else x_RW * signs_W.astype(x_RW.dtype)[None]


def rotate_quantize(
  x_RW: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer,
  signs_W: jax.Array | None,
  noise_RW: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes [R, W], scales [R, W / group] and, for "quest", the trust mask, int8 [R, W]."""
  return codes.quantize(rotate_wide(x_RW, rotation, signs_W), quantizer, noise_RW)
