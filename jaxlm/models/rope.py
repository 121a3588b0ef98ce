"""Computes rotary position embedding and its extensions to longer contexts.

Su et al., arXiv:2104.09864: pair j of a head turns by position * theta^(-2j / width). Pairs are
half-split: entry j goes with entry j + width / 2, as in the published Llama and Qwen weights.
Linear interpolation: arXiv:2306.15595. NTK-aware, dynamic and YaRN: arXiv:2309.00071, section 3,
with YaRN's ramp linear in the index of the pair, as in its released code. llama3: Llama 3.1's
released code.
"""

# B batch, T positions, N heads, H head width, R = H // 2 rotated pairs

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import RopeConfig, check
from pallas_kernels.common.checks import check_dtype, check_shape

Angles = tuple[jax.Array, jax.Array]  # cosines and sines [B, T, R]


def rope_tables(
  rope: RopeConfig, positions_BT: jax.Array, width: int, lengths_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines of the angles, float32 [B, T, width / 2], times the attention factor.

  `positions_BT` holds integers [B or 1, T]; `lengths_BT` [B or 1, T or 1] those of each token's
  sequence, for dynamic scaling. Raises UserError for positions of another shape or dtype.
  """
  check_shape("positions_BT", positions_BT, (None, None))
  check_dtype("positions_BT", positions_BT, jnp.integer)
  f_BTR, attention_factor = frequencies(rope, width, lengths_BT)
  if f_BTR.ndim == 1:
    f_BTR = f_BTR[None, None]
  angles_BTR = positions_BT[..., None].astype(jnp.float32) * f_BTR
  tables_BTH = attention_factor * jnp.concatenate(
    (jnp.cos(angles_BTR), jnp.sin(angles_BTR)), axis=-1
  )
  # behind a concatenation XLA on CPU keeps the tables; otherwise every rotation computes them again
  cos_BTR, sin_BTR = jnp.split(jax.lax.optimization_barrier(tables_BTH), 2, axis=-1)
  return cos_BTR, sin_BTR


@jax.custom_vjp
def apply_rope(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
  """Turns every pair (x[j], x[j + R]) of every head by its angle in float32; returns x's dtype.

  `cos_BTR` and `sin_BTR` are [B or 1, T, R] for `x_BTNH` [B, T, N, 2 R], else UserError. They are
  constants: no gradient reaches them.
  """
  check_shape("cos_BTR", cos_BTR, (None, None, None))
  check_shape("sin_BTR", sin_BTR, cos_BTR.shape)
  shared, length, pairs = cos_BTR.shape
  check_shape("x_BTNH", x_BTNH, (None if shared == 1 else shared, length, None, 2 * pairs))
  cos_BTNR, sin_BTNR = cos_BTR[:, :, None], sin_BTR[:, :, None]
  left_BTNR, right_BTNR = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = (
    left_BTNR * cos_BTNR - right_BTNR * sin_BTNR,
    right_BTNR * cos_BTNR + left_BTNR * sin_BTNR,
  )
  # without the barrier XLA on CPU computes inside the concatenation, entry by entry
  return jnp.concatenate(jax.lax.optimization_barrier(turned), axis=-1).astype(x_BTNH.dtype)


def _apply_rope_forward(
  x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array
) -> tuple[jax.Array, Angles]:
  return apply_rope(x_BTNH, cos_BTR, sin_BTR), (cos_BTR, sin_BTR)


def _apply_rope_backward(
  angles: Angles, dy_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rotates by the opposite angle, the transpose of a rotation: as fast as the forward pass."""
  cos_BTR, sin_BTR = angles
  return apply_rope(dy_BTNH, cos_BTR, -sin_BTR), jnp.zeros_like(cos_BTR), jnp.zeros_like(sin_BTR)


apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)


def sequence_lengths(positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
  """Returns the lengths that dynamic scaling goes by, int32 [B or 1, 1]: the last position plus 1.

  With segments [B or 1, T] each is a sequence of its own, as long as from its first position to its
  last, and lengths are [B or 1, T]: what else stands in the row changes nothing.
  """
  if segment_ids_BT is None:
    return jnp.max(positions_BT, axis=1, keepdims=True) + 1
  same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  offsets_BTS = positions_BT[:, None, :] - positions_BT[:, :, None]
  last_BT = jnp.max(jnp.where(same_BTS, offsets_BTS, 0), axis=2)
  first_BT = jnp.min(jnp.where(same_BTS, offsets_BTS, 0), axis=2)
  return last_BT - first_BT + 1


def frequencies(
  rope: RopeConfig, width: int, length: int | jax.Array | None = None
) -> tuple[jax.Array, float]:
  """Returns radians per position of each pair, float32 [width / 2], and the factor on cos and sin.

  `length` is the number of positions seen so far: an int, or int32 of any shape, which may be
  traced. Dynamic scaling alone reads and needs it: it returns [..., width / 2], and keys cached
  under it must be cached before rotation. Raises UserError when `width` is odd or too small for the
  scaling, and when YaRN's two borders are out of order.
  """
  check(
    width >= 2 and width % 2 == 0,
    "width",
    width,
    "rotary embedding needs an even width of at least 2",
  )
  index_R = np.arange(width // 2)
  f_R = rope.theta ** (-2 * index_R / width)
  attention_factor = 1.0
  match rope.scaling:
    case "linear":
      f_R = f_R / rope.factor
    case "ntk" | "dynamic":
      # theta' = theta * stretch^(width / (width - 2)): the slowest pair slows down by `stretch`
      check(width > 2, "width", width, f"{rope.scaling} scaling needs a width above 2")
      exponent_R = -2 * index_R / (width - 2)
      if rope.scaling == "ntk":
        f_R = f_R * rope.factor**exponent_R
      else:
        check(length is not None, "length", length, "dynamic scaling goes by the sequence's length")
        stretch = _dynamic_stretch(rope, jnp.asarray(length))[..., None]
        leading = tuple(range(stretch.ndim - 1))
        f_R = np.expand_dims(f_R, leading) * stretch ** np.expand_dims(exponent_R, leading)
    case "yarn":
      f_R = _by_parts(f_R, rope.factor, 1 - _yarn_ramp(rope, index_R, width))
      attention_factor = _yarn_attention_factor(rope)
    case "llama3":
      rotations_R = rope.original_length * f_R / (2 * math.pi)
      share_R = (rotations_R - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
      )
      f_R = _by_parts(f_R, rope.factor, np.clip(share_R, 0, 1))
  return jnp.asarray(f_R, jnp.float32), attention_factor


def _by_parts(f_R: np.ndarray, factor: float, share_R: np.ndarray) -> np.ndarray:
  """Interpolates between f / factor (share = 0) and f (share = 1)."""
  return (1 - share_R) * f_R / factor + share_R * f_R


def _dynamic_stretch(rope: RopeConfig, length: jax.Array) -> jax.Array:
  """Returns factor * l / L - (factor - 1), float32, with l = max(length, L): exactly 1 up to L."""
  beyond = jnp.maximum(length - rope.original_length, 0) / rope.original_length
  return 1 + rope.factor * beyond.astype(jnp.float32)


def _yarn_ramp(rope: RopeConfig, index_R: np.ndarray, width: int) -> np.ndarray:
  """Returns YaRN's ramp over the pairs, linear between two borders.

  It is 0 for pairs that turn over beta_fast times within the original length, and 1 for those that
  turn under beta_slow times.
  """

  def border(rotations: float) -> float:
    return (
      width
      * math.log(rope.original_length / (2 * math.pi * rotations))
      / (2 * math.log(rope.theta))
    )

  low, high = border(rope.beta_fast), border(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  rule = f"yarn's ramp from pair {low} to {high} runs backwards (beta_slow={rope.beta_slow}, "
  rule += f"theta={rope.theta}, original_length={rope.original_length}, width={width})"
  check(low <= high, "model.rope.beta_fast", rope.beta_fast, rule)
  return np.clip((index_R - low) / (high - low or 0.001), 0, 1)


def _yarn_attention_factor(rope: RopeConfig) -> float:
  """Returns the given factor, or the quotient of both mscales' growth, or 0.1 ln(factor) + 1."""

  def growth(mscale: float) -> float:
    return 0.1 * mscale * math.log(rope.factor) + 1

  if rope.attention_factor is not None:
    return rope.attention_factor
  if rope.mscale is not None and rope.mscale_all_dim is not None:
    return growth(rope.mscale) / growth(rope.mscale_all_dim)
  return growth(1)
