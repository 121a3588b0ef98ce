"""Materialised logits and JAX's own gradient: short, exact, and what every other implementation is compared with."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Options, Statistics


def statistics(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
) -> Statistics:
  """Row statistics from all N x V logits in float32 (float64 for float64 inputs)."""
  dtype = terms.accumulator(embeddings_ND.dtype)
  product_NV = jnp.einsum(
    f"nd,{options.layout}->nv",
    embeddings_ND,
    classifier,
    preferred_element_type=dtype,
    precision=jax.lax.Precision.HIGHEST,
  )
  x_NV = terms.logits(product_NV, None if bias_V is None else bias_V[None], options)
  hit_NV = jnp.arange(x_NV.shape[1])[None] == labels_N[:, None]
  return Statistics(
    jax.nn.logsumexp(x_NV, axis=1),
    jnp.sum(jnp.where(hit_NV, x_NV, 0.0), axis=1),
    jnp.sum(x_NV, axis=1) if options.total else jnp.zeros_like(x_NV[:, 0]),
  )
