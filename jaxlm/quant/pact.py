"""Learns an upper clip for inputs that are not negative (Choi et al. 2018, arXiv 1805.06085)."""

# Z any leading axes, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import PactFormat
from jaxlm.quant.gradients import with_scale_gradient
from jaxlm.quant.groups import Encoded, learned

LEAST_CLIP = 1e-8


def quantize(x_ZD: jax.Array, format: PactFormat, N: int, *, clip: jax.Array) -> jax.Array:
  """Returns clip(x, 0, a) on 2^bits levels, in x's dtype; a is the learned clip [1].

  x gets the gradient where 0 <= x < a, and a its sum where x >= a (equations 2 and 3).
  """
  x32_ZD = jax.lax.stop_gradient(x_ZD).astype(jnp.float32)
  a = learned(clip, x_ZD, LEAST_CLIP)
  quantized_ZD = decode(encode(x32_ZD, format, clip=jax.lax.stop_gradient(clip)), format)
  inside_ZD, above_ZD = (x32_ZD >= 0) & (x32_ZD < a), x32_ZD >= a
  return with_scale_gradient(x_ZD, clip, quantized_ZD, inside_ZD, above_ZD.astype(jnp.float32), 1.0)


def encode(x_ZD: jax.Array, format: PactFormat, *, clip: jax.Array) -> Encoded:
  """Returns codes from 0 to 2^bits - 1 and the step."""
  a = jnp.maximum(clip[0], LEAST_CLIP)
  scale = a / (2**format.bits - 1)
  codes_ZD = jnp.round(jnp.clip(x_ZD.astype(jnp.float32), 0, a) / scale)
  return Encoded(codes_ZD.astype(jnp.int32), scale)


def decode(encoded: Encoded, format: PactFormat) -> jax.Array:
  """Returns the float32 values that codes and step stand for."""
  return encoded.codes.astype(jnp.float32) * encoded.scale


def init_scales(x_ZD: jax.Array, format: PactFormat) -> dict[str, jax.Array]:
  """Returns the first clip, [1]."""
  return {"clip": jnp.full((1,), format.start, jnp.float32)}
