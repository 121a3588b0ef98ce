"""Materialises the logits, for JAX's own gradient; others are compared with it."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options, Statistics


def statistics(inputs: Inputs, options: Options) -> Statistics:
  """Returns row statistics from all N x V logits in float32 (float64 for float64 inputs)."""
  product_NV = jnp.einsum(
    f"nd,{options.layout}->nv",
    inputs.embeddings_ND,
    inputs.classifier,
    preferred_element_type=terms.accumulator(inputs.embeddings_ND.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  bias_1V = None if inputs.bias_V is None else inputs.bias_V[None]
  x_NV = terms.logits(product_NV, bias_1V, options)
  hit_NV = jnp.arange(x_NV.shape[1])[None] == inputs.labels_N[:, None]
  return Statistics(
    jax.nn.logsumexp(x_NV, axis=1),
    jnp.sum(jnp.where(hit_NV, x_NV, 0.0), axis=1),
    jnp.sum(x_NV, axis=1) if options.needs_total else jnp.zeros_like(x_NV[:, 0]),
  )
