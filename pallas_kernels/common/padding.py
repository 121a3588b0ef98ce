"""Rounds sizes up to whole tiles and pads arrays to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def round_up(size: int, multiple: int) -> int:
  """Returns the smallest multiple of `multiple` that is at least `size`."""
  return -(-size // multiple) * multiple


def pad_axis(array: jax.Array, size: int, axis: int, value: float = 0) -> jax.Array:
  """Pads one axis at its end to at least `size` with `value`; a longer axis stays as it is."""
  missing = max(0, size - array.shape[axis])
  widths = [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)]
  return jnp.pad(array, widths, constant_values=value) if missing else array
