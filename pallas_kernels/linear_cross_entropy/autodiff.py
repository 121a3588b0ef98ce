"""The two differentiable operations: row statistics on any backend, and a whole scalar loss on xla."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms, xla
from pallas_kernels.linear_cross_entropy.terms import Options, Statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def statistics(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
  backend: ModuleType,
) -> Statistics:
  """Row statistics over the whole vocabulary. `backend` has `statistics` and `gradients`.

  Between the passes 8 bytes a token are kept; the backward pass computes the logits again.
  """
  return _statistics_forward(embeddings_ND, classifier, labels_N, bias_V, options, backend)[0]


def _statistics_forward(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
  backend: ModuleType,
) -> tuple[Statistics, Any]:
  local = backend.statistics(embeddings_ND, classifier, labels_N, bias_V, options)
  stats = terms.combine(local, options.axis_name)
  return stats, (embeddings_ND, classifier, labels_N, bias_V, stats)


def _statistics_backward(options: Options, backend: ModuleType, saved: Any, cotangents: Statistics) -> tuple[Any, ...]:
  embeddings_ND, classifier, labels_N, bias_V, stats = saved
  scale = _half_precision_scale(embeddings_ND.dtype, cotangents)
  rows = terms.backward_rows(stats, jax.tree.map(lambda c_N: c_N / scale, cotangents))
  de_ND, dc, db_V = backend.gradients(embeddings_ND, classifier, labels_N, bias_V, rows, options)
  return (
    (de_ND * scale).astype(embeddings_ND.dtype),
    (dc * scale).astype(classifier.dtype),
    None,
    None if bias_V is None else (db_V * scale).astype(bias_V.dtype),
  )


def _half_precision_scale(dtype: jnp.dtype, cotangents: Statistics) -> jax.Array | float:
  """What cotangents are divided by: in float16 a mean over many tokens makes most logit gradients underflow."""
  if dtype != jnp.float16:
    return 1.0
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(c_N)) for c_N in cotangents]))
  return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1.0)


statistics.defvjp(_statistics_forward, _statistics_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def loss_sum(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  counted_N: jax.Array,
  options: Options,
) -> jax.Array:
  """Sum of the loss over the counted rows, on xla; under differentiation the forward pass makes the gradients."""
  local = xla.statistics(embeddings_ND, classifier, labels_N, bias_V, options)
  stats = terms.combine(local, options.axis_name)
  return jnp.sum(terms.row_loss(terms.keep_counted(stats, counted_N), options))


def _loss_sum_forward(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  counted_N: jax.Array,
  options: Options,
) -> tuple[jax.Array, Any]:
  total, gradients = xla.weighted_gradients(embeddings_ND, classifier, labels_N, bias_V, counted_N, options)
  # Zero-sized: they carry the dtypes that the gradients, still in float32, are cast to.
  dtypes = jax.tree.map(lambda a: jnp.zeros(0, a.dtype), (embeddings_ND, classifier, bias_V))
  return total, (gradients, dtypes)


def _loss_sum_backward(options: Options, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
  gradients, dtypes = saved
  scaled = jax.tree.map(lambda g, like: (cotangent * g).astype(like.dtype), gradients, dtypes)
  de_ND, dc, db_V = scaled
  return de_ND, dc, None, db_V, None


loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward)
