"""Trains in few bits by rotating, clipping optimally and trusting gradients (arXiv 2502.05003).

QuEST (Panferov et al. 2025): a Hadamard rotation along the contracted axis makes values nearly
normal; a grid that is optimal for normal values of their mean square rounds them; values that land
far from their level get no gradient, in the rotated space.
"""

# Z any leading axes, D contracted axis, n = block of the rotation

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.checks import check
from jaxlm.config.formats import QuestFormat
from jaxlm.quant.gradients import straight_through
from jaxlm.quant.groups import Encoded
from jaxlm.quant.turning import turn

BEST_CLIP = {
  "int1": 0.797884561,
  "ternary": 1.224006,
  "int2": 1.493530,
  "int3": 2.051068,
  "int4": 2.514005,
  "int5": 2.916151,
  "int6": 3.277985,
  "int7": 3.611098,
  "int8": 3.922205,
}
"""Outermost level in units of the root mean square that minimises the error on N(0, 1)."""
REPO_CLIP = BEST_CLIP | {
  "ternary": 1.224008952,
  "int2": 1.493534620,
  "int3": 2.051068354,
  "int4": 2.513930579,
  "int5": 2.916093883,
  "int6": 3.276597283,
  "int7": 3.601049719,
  "int8": 3.884938679,
}
"""The constants of the published code; from 6 bits on they are not quite at the minimum."""
FP4_SCALE = 0.487079
"""Of the levels below, likewise."""
FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BINARY_TRUST = {True: 1.30, False: 1.25}
"""Where one bit trusts, in units of the level: with and without the rotation (`clip_scale`)."""
_REPO_FP4_TRUST = 0.3186


def quantize(x_ZD: jax.Array, format: QuestFormat) -> jax.Array:
  """Returns x on its grid, rotated back, in x's dtype.

  The gradient is ((dy H) M) H^T: masked in the rotated space, section 3.3.
  """
  return rotate(quantize_rotated(x_ZD, format), format)


def quantize_rotated(x_ZD: jax.Array, format: QuestFormat) -> jax.Array:
  """Returns x on its grid and still rotated, in x's dtype.

  The product of two such operands is that of the unrotated ones, without rotating back.
  """
  rotated_ZD = rotate(x_ZD, format)
  values_ZD = jax.lax.stop_gradient(rotated_ZD).astype(jnp.float32)
  keep_ZD = keep_pairs(values_ZD) if format.sparse else None
  encoded = _encode(values_ZD, keep_ZD, format)
  mask_ZD = trust_mask(values_ZD, encoded, keep_ZD, format)
  return straight_through(rotated_ZD, decode(encoded, format), mask_ZD)


def rotate(x_ZD: jax.Array, format: QuestFormat) -> jax.Array:
  """Returns x times blocks of H / sqrt(n) along the last axis, computed in float32.

  It is its own inverse. Raises UserError where the block does not divide the axis.
  """
  return turn(x_ZD, format.hadamard)


def encode(x_ZD: jax.Array, format: QuestFormat) -> Encoded:
  """Returns codes of the rotated values, and the step of each row (of FP4: the unit).

  Codes k of bits stand for k - 1/2 steps, ternary ones for -1, 0, 1, and those of FP4 for the sign
  times the index of the level. With `sparse` the codes of what is zeroed are 0 in `decode_sparse`.
  """
  values_ZD = rotate(x_ZD.astype(jnp.float32), format)
  return _encode(values_ZD, keep_pairs(values_ZD) if format.sparse else None, format)


def decode(encoded: Encoded, format: QuestFormat) -> jax.Array:
  """Returns the float32 values, still rotated, that codes and scales stand for."""
  codes_ZD, scale_Z1 = encoded.codes, encoded.scale[..., None]
  if format.levels == "fp4":
    steps = [above - below for below, above in zip(FP4_LEVELS, FP4_LEVELS[1:])]
    size_ZD = sum((jnp.abs(codes_ZD) > i) * step for i, step in enumerate(steps))
    levels_ZD = jnp.sign(codes_ZD) * size_ZD
  elif format.levels == "ternary":
    levels_ZD = codes_ZD.astype(jnp.float32)
  else:
    levels_ZD = codes_ZD.astype(jnp.float32) - 0.5
  if format.sparse:
    levels_ZD = jnp.where(codes_ZD == PRUNED, 0.0, levels_ZD)
  return levels_ZD * scale_Z1


PRUNED = -128
"""The code of an entry that sparsity zeroes; no level has it."""


def _encode(values_ZD: jax.Array, keep_ZD: jax.Array | None, format: QuestFormat) -> Encoded:
  """Returns codes of values that are rotated already."""
  root_Z = jnp.sqrt(jnp.mean(jnp.square(values_ZD), axis=-1))
  if format.levels == "fp4":
    scale_Z = FP4_SCALE * root_Z + 1e-8
    middles = [(a + b) / 2 for a, b in zip(FP4_LEVELS, FP4_LEVELS[1:])]
    size_ZD = jnp.abs(values_ZD) / scale_Z[..., None]
    index_ZD = sum((size_ZD > middle).astype(jnp.int32) for middle in middles)
    codes_ZD = jnp.where(values_ZD < 0, -index_ZD, index_ZD)
  else:
    levels = _count(format)
    bound_Z = _clip(format) * root_Z + 1e-8
    scale_Z = 2 * bound_Z / (levels - 1)
    v_ZD = values_ZD / scale_Z[..., None]
    if format.levels == "ternary":
      codes_ZD = jnp.clip(jnp.round(v_ZD), -1, 1)
    else:
      codes_ZD = jnp.clip(jnp.round(v_ZD + 0.5), 1 - levels // 2, levels // 2)
  if keep_ZD is not None:
    codes_ZD = jnp.where(keep_ZD, codes_ZD, PRUNED)
  return Encoded(codes_ZD.astype(jnp.int32), scale_Z)


def trust_mask(
  values_ZD: jax.Array, encoded: Encoded, keep_ZD: jax.Array | None, format: QuestFormat
) -> jax.Array:
  """Returns where rotated values get a gradient: those within half a step of their level.

  Inside the grid that is everywhere, so the test is against the grid's end, where rounding cannot
  decide it. What sparsity zeroes is trusted where it was small.
  """
  size_ZD, scale_Z1 = jnp.abs(values_ZD), encoded.scale[..., None]
  if format.levels == "fp4":
    outer_Z1, half_Z1 = 7 * scale_Z1, scale_Z1
    if format.repo_compat:
      half_Z1 = _REPO_FP4_TRUST / FP4_SCALE * scale_Z1
      error_ZD = jnp.abs(values_ZD - decode(encoded, format))
      return error_ZD <= half_Z1
  else:
    half_Z1 = scale_Z1 / 2
    outer_Z1 = half_Z1 * _count(format)
    if format.levels == "int1":
      outer_Z1 = half_Z1 * _BINARY_TRUST[format.hadamard > 0]
  if keep_ZD is None:
    return size_ZD <= outer_Z1
  return size_ZD <= jnp.where(keep_ZD, outer_Z1, half_Z1)


def keep_pairs(values_ZD: jax.Array) -> jax.Array:
  """Returns bool [Z, D]: of four neighbouring pairs the two of largest norm (section 4.4)."""
  *lead, D = values_ZD.shape
  check(D % 8 == 0, "format.sparse", True, f"needs a contracted axis of 8, 16, ..., not {D}")
  norms = jnp.sum(jnp.square(values_ZD).reshape(*lead, D // 8, 4, 2), axis=-1)
  ranks = jnp.argsort(jnp.argsort(-norms, axis=-1, stable=True), axis=-1, stable=True)
  return jnp.repeat((ranks < 2)[..., None], 2, axis=-1).reshape(values_ZD.shape)


def _count(format: QuestFormat) -> int:
  return 3 if format.levels == "ternary" else 2 ** int(format.levels.removeprefix("int"))


def _clip(format: QuestFormat) -> float:
  return (REPO_CLIP if format.repo_compat else BEST_CLIP)[format.levels]
