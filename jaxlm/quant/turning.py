"""Turns arrays by blocks of Hadamard matrices along the contracted axis, which spreads outliers."""

# Z any leading axes, D contracted axis, n order of the matrix

from __future__ import annotations

import jax

from jaxlm.config.checks import check
from pallas_kernels.common.errors import UserError
from pallas_kernels.hadamard import hadamard


def turn(x_ZD: jax.Array, n: int, signs_n: jax.Array | None = None) -> jax.Array:
  """Returns blocks of n entries of the last axis times diag(signs) H / sqrt(n); 0: x itself.

  Without signs it is its own inverse. Sums are float32. Raises UserError where n does not divide
  the axis, or there is no such matrix.
  """
  if not n:
    return x_ZD
  D = x_ZD.shape[-1]
  check(D % n == 0, "hadamard", n, f"must divide the {D} entries of the contracted axis")
  blocks = x_ZD.reshape(*x_ZD.shape[:-1], D // n, n)
  return hadamard(blocks, signs=signs_n, base=hadamard_base(n)).reshape(x_ZD.shape)


def hadamard_base(n: int) -> int:
  """Returns the part of n, of 1, 12, 20, 28 and 40, whose Hadamard matrix times 2^k has order n."""
  for base in (1, 12, 20, 28, 40):
    power, rest = divmod(n, base)
    if rest == 0 and power & (power - 1) == 0:
      return base
  raise UserError(f"hadamard={n}: must be a power of two, or 12, 20, 28 or 40 times one")
