"""Rounds weights to three values with one scale (Ma et al. 2024, BitNet b1.58, arXiv 2402.17764).

The paper's activations are `UniformFormat(bits=8)`: absmax per token.
"""

# Z output channels, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import BitnetFormat
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded

EPS = 1e-5


def quantize(w_ZD: jax.Array, format: BitnetFormat) -> jax.Array:
  """Returns the mean magnitude times -1, 0 or 1 in w's dtype, with all of the gradient."""
  encoded = encode(jax.lax.stop_gradient(w_ZD), format)
  return straight_through(w_ZD, decode(encoded, format), None)


def encode(w_ZD: jax.Array, format: BitnetFormat) -> Encoded:
  """Returns round(clip(w / mean|w|, -1, 1)), equations 1 to 3, and the mean magnitude."""
  w32_ZD = w_ZD.astype(jnp.float32)
  scale = jnp.mean(jnp.abs(w32_ZD))
  codes_ZD = jnp.clip(jnp.round(w32_ZD / (scale + EPS)), -1, 1)
  return Encoded(codes_ZD.astype(jnp.int32), scale)


def decode(encoded: Encoded, format: BitnetFormat) -> jax.Array:
  """Returns the float32 values that codes and scale stand for."""
  return encoded.codes.astype(jnp.float32) * encoded.scale
