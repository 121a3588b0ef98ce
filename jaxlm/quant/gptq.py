"""Rounds a weight column by column, each error made up for by the columns that follow.

GPTQ (Frantar et al. 2022, arXiv 2210.17323). A group's scale is that of the weights as they are
when its first column is reached; the published code takes those before the updates of its block.
"""

# F output channels, D contracted axis, Z samples

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxlm.config.checks import check
from jaxlm.config.formats import UniformFormat
from jaxlm.quant import uniform
from jaxlm.quant.groups import Encoded

DAMPING = 0.01


def hessian(x_ZD: jax.Array) -> jax.Array:
  """Returns 2 x^T x / Z of the inputs of a matmul, float32 [D, D], without damping."""
  x32_ZD = x_ZD.astype(jnp.float32)
  return 2 / len(x32_ZD) * jnp.einsum("zd,ze->de", x32_ZD, x32_ZD, precision="highest")


@functools.partial(jax.jit, static_argnums=2)
def solve(w_FD: jax.Array, hessian_DD: jax.Array, format: UniformFormat) -> Encoded:
  """Returns codes and scales that make the outputs' error small, not the weights'.

  With a multiple of the identity for a Hessian it is rounding to the nearest. Formats are per row
  or per group. Inputs that were always zero change nothing.
  """
  good = format.shared in ("row", "group") and format.grid != "midrise"
  check(good, "format", str(format), "GPTQ is written for grids with a zero, per row or group")
  F, D = w_FD.shape
  size = D if format.shared == "row" else format.size
  check(D % size == 0, "format.size", size, f"must divide the {D} entries of the contracted axis")
  damp = DAMPING * jnp.mean(jnp.diagonal(hessian_DD))
  inverse = jnp.linalg.inv(hessian_DD + (damp + (damp == 0)) * jnp.eye(D))
  upper_DD = jnp.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
  per_row = UniformFormat(**{**_fields(format), "shared": "row"})
  low, high = uniform.code_range(format)

  def column(j: jax.Array, carry: tuple) -> tuple:
    w_FD, codes_FD, scale_F, zero_F = carry
    w_F = w_FD[:, j]
    codes_F = jnp.clip(jnp.round(w_F / jnp.where(scale_F > 0, scale_F, 1.0) + zero_F), low, high)
    error_F = (w_F - scale_F * (codes_F - zero_F)) / upper_DD[j, j]
    w_FD = w_FD - error_F[:, None] * upper_DD[j][None]
    return w_FD, codes_FD.at[:, j].set(codes_F.astype(jnp.int32)), scale_F, zero_F

  w_FD, codes_FD = w_FD.astype(jnp.float32), jnp.zeros((F, D), jnp.int32)
  scales, zeros = [], []
  for start in range(0, D, size):
    found = uniform.encode(w_FD[:, start : start + size], per_row)
    zero_F = jnp.zeros(F) if found.zero is None else found.zero
    carry = (w_FD, codes_FD, found.scale, zero_F)
    w_FD, codes_FD, *_ = jax.lax.fori_loop(start, start + size, column, carry)
    scales.append(found.scale)
    zeros.append(zero_F)
  stack = functools.partial(jnp.stack, axis=1)
  scale, zero = (stack(x) if format.shared == "group" else x[0] for x in (scales, zeros))
  return Encoded(codes_FD, scale, zero if format.grid == "affine" else None)


def _fields(format: UniformFormat) -> dict:
  return {name: getattr(format, name) for name in format.__dataclass_fields__}
