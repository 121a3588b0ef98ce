"""Materialises the logits, for JAX's own gradient; others are compared with it."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options, Statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def statistics(inputs: Inputs, options: Options) -> Statistics:
  """Returns row statistics from all N x V logits in float32 (float64 for float64 inputs).

  The gradient is JAX's own, of the rows that have a cotangent: a row without one adds nothing,
  even where it is not finite, of which 0 times NaN would make NaN.
  """
  return _statistics(inputs, options)


def _forward(inputs: Inputs, options: Options) -> tuple[Statistics, Inputs]:
  return _statistics(inputs, options), inputs


def _backward(options: Options, inputs: Inputs, cotangents: Statistics) -> tuple[Inputs]:
  active_N = functools.reduce(jnp.logical_or, (cotangent_N != 0 for cotangent_N in cotangents))
  embeddings_ND = jnp.where(active_N[:, None], inputs.embeddings_ND, 0.0)

  def of_floats(embeddings_ND: jax.Array, classifier: jax.Array, bias_V: jax.Array | None):
    return _statistics(Inputs(embeddings_ND, classifier, inputs.labels_N, bias_V), options)

  _, pull_back = jax.vjp(of_floats, embeddings_ND, inputs.classifier, inputs.bias_V)
  d_embeddings_ND, d_classifier, d_bias_V = pull_back(cotangents)
  return (Inputs(d_embeddings_ND, d_classifier, None, d_bias_V),)  # type: ignore[arg-type]


statistics.defvjp(_forward, _backward)


def _statistics(inputs: Inputs, options: Options) -> Statistics:
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
