"""Nests 2-bit and 4-bit weights in the top bits of int8 codes (Nair et al. 2025, arXiv 2502.06786).

Slices are always taken from the 8-bit codes: rounding twice gives other codes.
"""

# Z output channels, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import MatquantFormat, UniformFormat
from jaxlm.quant import uniform
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded


def quantize(w_ZD: jax.Array, format: MatquantFormat) -> jax.Array:
  """Returns weights of the top bits in w's dtype, with all of the gradient (straight through)."""
  encoded = encode(jax.lax.stop_gradient(w_ZD), format)
  return straight_through(w_ZD, decode(encoded, format), None)


def encode(w_ZD: jax.Array, format: MatquantFormat) -> Encoded:
  """Returns codes from 0 to 2^bits - 1 (2^bits with `extra`), and scale and zero of 8 bits.

  The base codes are affine from the smallest to the largest weight, equation 1.
  """
  base = uniform.encode(w_ZD, _base(format))
  sliced = slice_codes(base.codes, format.bits, extra=format.extra)
  return base._replace(codes=sliced >> (8 - format.bits))


def decode(encoded: Encoded, format: MatquantFormat) -> jax.Array:
  """Returns the float32 values that codes stand for."""
  codes = encoded.codes << (8 - format.bits)
  return uniform.decode(encoded._replace(codes=codes), _base(format))


def slice_codes(codes: jax.Array, bits: int, *, extra: bool = False) -> jax.Array:
  """Returns 8-bit codes rounded to multiples of 2^(8 - bits), half up: S(q, r), equation 2.

  Codes that would round to 256 are clipped to the largest multiple below, except with `extra`
  (the paper's errata).
  """
  step = 2 ** (8 - bits)
  sliced = (codes + step // 2) // step
  return step * (sliced if extra else jnp.minimum(sliced, 2**bits - 1))


def _base(format: MatquantFormat) -> UniformFormat:
  return UniformFormat(bits=8, grid="affine", shared=format.shared, size=format.size)
