"""Learns step sizes (Esser et al. 2020, Learned Step Size Quantization, arXiv 1902.08153)."""

# Z any leading axes, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.formats import LsqFormat
from jaxlm.quant.gradients import with_scale_gradient
from jaxlm.quant.groups import Encoded, learned

LEAST_STEP = 1e-8
"""what a step that training drove to zero or below counts as, so that it can come back"""


def quantize(
  x_ZD: jax.Array, format: LsqFormat, N: int, *, step: jax.Array, least: float = LEAST_STEP
) -> jax.Array:
  """Returns step * round(clip(x / step, Qn, Qp)), equation 1, in x's dtype.

  x gets the gradient inside the clip. The step, [1] or [Z], gets equation 3 times 1 / sqrt(N Qp),
  where N counts the weights of the layer, or the features of an input (section 2.2).
  """
  x32_ZD, low, high, offset = x_ZD.astype(jnp.float32), *code_range(format), _offset(format)
  s = learned(step, x_ZD, least)
  v_ZD = jax.lax.stop_gradient(x32_ZD) / s - offset
  codes_ZD = jnp.round(jnp.clip(v_ZD, low, high))
  inside_ZD = (low <= v_ZD) & (v_ZD <= high)
  slope_ZD = jnp.where(inside_ZD, codes_ZD - v_ZD, codes_ZD + offset)
  factor = float(N * max(high, 1)) ** -0.5
  return with_scale_gradient(x_ZD, step, s * (codes_ZD + offset), inside_ZD, slope_ZD, factor)


def encode(x_ZD: jax.Array, format: LsqFormat, *, step: jax.Array) -> Encoded:
  """Returns the codes under a learned step."""
  low, high = code_range(format)
  s = learned(step, x_ZD, LEAST_STEP)
  codes_ZD = jnp.round(jnp.clip(x_ZD.astype(jnp.float32) / s - _offset(format), low, high))
  scale = jnp.maximum(step, LEAST_STEP)
  return Encoded(codes_ZD.astype(jnp.int32), scale[0] if step.shape == (1,) else scale)


def decode(encoded: Encoded, format: LsqFormat) -> jax.Array:
  """Returns the float32 values that codes and steps stand for."""
  scale = encoded.scale if encoded.scale.ndim == 0 else encoded.scale[:, None]
  return (encoded.codes.astype(jnp.float32) + _offset(format)) * scale


def init_scales(x_ZD: jax.Array, format: LsqFormat) -> dict[str, jax.Array]:
  """Returns the first step for these values, section 2.1: [1], or [Z] per row."""
  axes = None if format.shared == "tensor" else -1
  x32_ZD = x_ZD.astype(jnp.float32)
  if format.start == "gaussian":
    from jaxlm.quant.quest import BEST_CLIP

    root = jnp.sqrt(jnp.mean(jnp.square(x32_ZD), axis=axes))
    step = 2 * BEST_CLIP[f"int{format.bits}"] / (2**format.bits - 1) * root
  else:
    step = 2 * jnp.mean(jnp.abs(x32_ZD), axis=axes) / max(code_range(format)[1], 1) ** 0.5
  return {"step": step.reshape(-1)}


def code_range(format: LsqFormat) -> tuple[int, int]:
  """Returns the smallest and the largest code, Qn and Qp."""
  if format.grid == "unsigned":
    return 0, 2**format.bits - 1
  return -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1


def _offset(format: LsqFormat) -> float:
  return 0.5 if format.grid == "midrise" else 0.0
