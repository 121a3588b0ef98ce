"""Differentiates rotations and the rounded values of rotated rows: the gradient rotates back."""

# R rows, W width of the rotated axis, G groups of a row
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.hadamard import codes
from pallas_kernels.hadamard.codes import Quantizer
from pallas_kernels.hadamard.matrices import Rotation


class Rotated(NamedTuple):
  """Holds the codes of a rotated array, their scales, and where a gradient passes."""

  codes: jax.Array
  """[..., W]"""
  scales: jax.Array
  """float32 [..., W / group]"""
  trust_mask: jax.Array | None = None
  """bool [..., W] for scale="quest", else None: nothing is clipped"""


class Setting(NamedTuple):
  """Holds what is static in a call."""

  implementation: Any
  """module with `rotate` and `rotate_quantize`"""
  rotation: Rotation
  quantizer: Quantizer | None
  interpret: Any

  @property
  def options(self) -> dict[str, Any]:
    """Returns what kernels take besides, where they are interpreted."""
    return dict(interpret=self.interpret) if self.interpret else {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate(
  x_RW: jax.Array, signs_W: jax.Array | None, noise_RW: None, setting: Setting
) -> jax.Array:
  """Rotates rows; the gradient rotates back, in one pass of the same kernel."""
  del noise_RW
  return run_rotation(x_RW, signs_W, None, setting)


def run_rotation(
  x_RW: jax.Array, signs_W: jax.Array | None, out_signs_W: jax.Array | None, setting: Setting
) -> jax.Array:
  """Returns (x . signs) H / sqrt(n) . out_signs by the implementation of the setting."""
  run = setting.implementation.rotate
  return run(x_RW, setting.rotation, signs_W, out_signs_W, **setting.options)


def rotate_back(
  signs_W: jax.Array | None, dy_RW: jax.Array, setting: Setting
) -> tuple[jax.Array, jax.Array | None, None]:
  """Returns the gradients of x, signs (zero) and noise."""
  dx_RW = run_rotation(dy_RW, None, signs_W, setting)
  return dx_RW, None if signs_W is None else jnp.zeros_like(signs_W), None


rotate.defvjp(
  lambda x_RW, signs_W, noise_RW, setting: (rotate(x_RW, signs_W, noise_RW, setting), signs_W),
  lambda setting, signs_W, dy_RW: rotate_back(signs_W, dy_RW, setting),
)


def run_quantization(
  x_RW: jax.Array, signs_W: jax.Array | None, noise_RW: jax.Array | None, setting: Setting
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns codes, scales and the mask, int8, by the implementation of the setting."""
  run = setting.implementation.rotate_quantize
  return run(x_RW, setting.rotation, setting.quantizer, signs_W, noise_RW, **setting.options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate_to_codes(
  x_RW: jax.Array, signs_W: jax.Array | None, noise_RW: jax.Array | None, setting: Setting
) -> Rotated:
  """Returns codes, scales and mask of rows; differentiating them raises."""
  codes_RW, scales_RG, mask_RW = run_quantization(x_RW, signs_W, noise_RW, setting)
  return Rotated(codes_RW, scales_RG, None if mask_RW is None else mask_RW.astype(bool))


def refuse_gradient(*_: Any) -> Any:
  """Raises: what a loss does with codes has no gradient that this function could pass on."""
  raise UnsupportedError(
    "hadamard_quantize: codes and scales have no gradient; values=True has the straight-through "
    "one, and jax.lax.stop_gradient(x) says that none is wanted"
  )


rotate_to_codes.defvjp(refuse_gradient, refuse_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate_to_values(
  x_RW: jax.Array, signs_W: jax.Array | None, noise_RW: jax.Array | None, setting: Setting
) -> jax.Array:
  """Returns the rounded, rotated rows, with the straight-through gradient."""
  return values_forward(x_RW, signs_W, noise_RW, setting)[0]


def values_forward(
  x_RW: jax.Array, signs_W: jax.Array | None, noise_RW: jax.Array | None, setting: Setting
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Returns the values, and for the gradient the signs, the mask and whether there was noise."""
  assert setting.quantizer is not None, "values are those of a quantiser"
  codes_RW, scales_RG, mask_RW = run_quantization(x_RW, signs_W, noise_RW, setting)
  y_RW = codes.decode(codes_RW, scales_RG, setting.quantizer.scale).astype(x_RW.dtype)
  return y_RW, (signs_W, mask_RW, noise_RW)


def values_backward(
  setting: Setting, saved: tuple[Any, ...], dy_RW: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Returns ((dy . mask) H) . signs / sqrt(n), and zeros for signs and noise."""
  signs_W, mask_RW, noise_RW = saved
  if mask_RW is not None:
    dy_RW = jnp.where(mask_RW != 0, dy_RW, jnp.zeros_like(dy_RW))
  dx_RW, d_signs_W, _ = rotate_back(signs_W, dy_RW, setting)
  return dx_RW, d_signs_W, None if noise_RW is None else jnp.zeros_like(noise_RW)


rotate_to_values.defvjp(values_forward, values_backward)
