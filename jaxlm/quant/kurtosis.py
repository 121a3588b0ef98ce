"""Measures how heavy the tails of activations are: what rotations remove and low bits suffer."""

# Z any leading axes, D features

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.quant.capture import capture


def kurtosis(x_ZD: jax.Array) -> jax.Array:
  """Returns E[((x - mean) / std)^4] over the last axis, averaged over all others; normal: 3.

  SpinQuant (Liu et al. 2024, arXiv 2405.16406), figure 2.
  """
  x32_ZD = x_ZD.astype(jnp.float32)
  centred_ZD = x32_ZD - jnp.mean(x32_ZD, axis=-1, keepdims=True)
  variance_Z = jnp.mean(jnp.square(centred_ZD), axis=-1)
  fourth_Z = jnp.mean(jnp.square(jnp.square(centred_ZD)), axis=-1)
  return jnp.mean(fourth_Z / jnp.maximum(jnp.square(variance_Z), 1e-30))


def kurtosis_of_inputs(config: ModelConfig, params: Any, ids_BT: jax.Array) -> dict[str, float]:
  """Returns the kurtosis of the input of every matmul, per token over features, by its name."""
  found = capture(config, params, ids_BT, lambda name, x_BTD, y_BTF: kurtosis(x_BTD))
  return {name: float(value) for name, value in found.items()}
