"""Kernels whose schedules can be counted by hand; as a program it prints them as JSON.

A program of its own, because libtpu writes listings only where nothing compiled with it before.
"""

# M, K, N sizes of a matrix product
import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.schedule import analyse


def matmul_kernel(a, b, out):
  out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)


def product(a_MK, b_KN, tile=512):
  """A whole K in every tile: nothing but matmuls, and the additions of their partial results."""
  (M, K), N = a_MK.shape, b_KN.shape[1]
  return pl.pallas_call(
    matmul_kernel,
    grid=(M // tile, N // tile),
    in_specs=[
      pl.BlockSpec((tile, K), lambda i, j: (i, 0)),
      pl.BlockSpec((K, tile), lambda i, j: (0, j)),
    ],
    out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name="product",
  )(a_MK, b_KN)


SHAPES = (
  jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16),
  jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16),
)


def doubled(x):
  """Returns twice `x` of float32 [2048, 1024] in 8 steps of 256 registers of 8 x 128 floats."""

  def double(x, out):
    out[...] = 2 * x[...]

  return pl.pallas_call(
    double,
    grid=(8,),
    in_specs=[pl.BlockSpec((256, 1024), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((256, 1024), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((2048, 1024), jnp.float32),
  )(x)


if __name__ == "__main__":
  floats = (jax.ShapeDtypeStruct((2048, 1024), jnp.float32),)
  cases = ((product, SHAPES, "v5e"), (product, SHAPES, "v5p"), (doubled, floats, "v5e"))
  for fn, args, chip in cases:
    (found,) = analyse(fn, args, chip)
    print(json.dumps({"name": f"{fn.__name__} {chip}", **dataclasses.asdict(found)}))
