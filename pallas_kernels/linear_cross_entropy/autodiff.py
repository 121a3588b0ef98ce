"""The two differentiable operations: row statistics on any backend, and a whole scalar loss on xla."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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


def _statistics_backward(
  options: Options, backend: ModuleType, saved: Any, cotangents: Statistics
) -> tuple[Any, ...]:
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


def _half_precision_scale(dtype: jnp.dtype, cotangents: tuple[jax.Array, ...]) -> jax.Array | float:
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
  weight_N: jax.Array,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """(`terms.total_loss`, lse [N]) on xla; under differentiation the forward pass makes the gradients of the first."""
  stats = statistics(embeddings_ND, classifier, labels_N, bias_V, options, xla)
  return terms.total_loss(stats, weight_N, options), stats.lse_N


def _loss_sum_forward(
  embeddings_ND: Any, classifier: Any, labels_N: Any, bias_V: Any, weight_N: Any, options: Options
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  e_ND, c, labels_N, weight_N = (
    argument.value for argument in (embeddings_ND, classifier, labels_N, weight_N)
  )
  bias_V = None if bias_V is None else bias_V.value
  scale = _half_precision_scale(e_ND.dtype, (weight_N,))
  stats, gradients = xla.loss_gradients(e_ND, c, labels_N, bias_V, weight_N / scale, options)
  saved = (e_ND, c, labels_N, bias_V, stats), weight_N, scale, gradients
  return (terms.total_loss(stats, weight_N, options), stats.lse_N), saved


def _loss_sum_backward(
  options: Options, saved: Any, cotangents: tuple[Any, Any]
) -> tuple[Any, ...]:
  (e_ND, c, labels_N, bias_V, stats), weight_N, scale, gradients = saved
  total, lse_N = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
  if lse_N is None:
    inputs = (e_ND, c, bias_V)  # whose dtypes the gradients, still in float32, are cast to
    de_ND, dc, db_V = jax.tree.map(
      lambda g, like: (total * scale * g).astype(like.dtype), gradients, inputs
    )
    return de_ND, dc, None, db_V, None
  # Also the log-sum-exp is differentiated: its cotangents are known only now, and the logits are computed again.
  _, pull_back = jax.vjp(
    lambda stats: (terms.total_loss(stats, weight_N, options), stats.lse_N), stats
  )
  (rows,) = pull_back((jnp.zeros((), lse_N.dtype) if total is None else total, lse_N))
  return *_statistics_backward(options, xla, (e_ND, c, labels_N, bias_V, stats), rows), None


loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)
