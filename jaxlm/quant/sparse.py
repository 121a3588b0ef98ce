"""Keeps the 2 largest of 4 neighbours (2:4 sparsity; Mishra et al. 2021, arXiv 2104.08378)."""

# Z any leading axes, D contracted axis

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config.checks import check
from jaxlm.config.formats import SparseFormat
from jaxlm.quant.gradients import straight_through


def quantize(w_ZD: jax.Array, format: SparseFormat) -> jax.Array:
  """Returns w with 2 of each 4 neighbours zeroed, in w's dtype."""
  keep_ZD = keep_mask(jax.lax.stop_gradient(w_ZD))
  mask_ZD = keep_ZD if format.masks_gradient else None
  return straight_through(w_ZD, jnp.where(keep_ZD, jax.lax.stop_gradient(w_ZD), 0), mask_ZD)


def keep_mask(w_ZD: jax.Array) -> jax.Array:
  """Returns bool [Z, D]: the 2 largest magnitudes of 4 neighbours, of equals the first.

  Raises UserError where 4 does not divide the contracted axis.
  """
  *lead, D = w_ZD.shape
  check(D % 4 == 0, "format", "2:4", f"needs a contracted axis of 4, 8, ..., not {D}")
  size = jnp.abs(w_ZD).reshape(*lead, D // 4, 4)
  ranks = jnp.argsort(jnp.argsort(-size, axis=-1, stable=True), axis=-1, stable=True)
  return (ranks < 2).reshape(w_ZD.shape)
