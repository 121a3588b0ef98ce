"""Gradients of a batch as the sum over its micro-batches, exact with unequal token counts."""

# M micro-batches, B batch

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.objectives.weighted import Weighted
from sharding.rules import defer_reduction, is_sharded, reduce_gradients, spec

Objective = Callable[[Any, Any], tuple[Weighted, Weighted]]


def accumulated_gradients(
  objective: Objective, params: Any, batch: Any, microbatches: int
) -> tuple[Any, Weighted]:
  """(gradient of the batch's mean objective, the summed metric), one micro-batch in memory at a time.

  `objective(params, batch)` returns what to minimise and a metric, both `Weighted`. Numerators' gradients, numerators
  and denominators are added; on a mesh each device keeps its own share of the sum until all micro-batches are done,
  so that every gradient is reduced once. One division by the whole batch's denominator ends it.
  """

  def summed(params: Any, batch: Any) -> tuple[jax.Array, tuple[Weighted, Weighted]]:
    loss, metric = objective(params, batch)
    return loss.num, (loss, metric)

  gradient = jax.grad(summed, has_aux=True)
  deferred = defer_reduction(params)
  if microbatches == 1:
    grads, (loss, metric) = gradient(deferred, batch)
  else:
    parts = jax.tree.map(lambda x: split_batch(x, microbatches), batch)
    first = gradient(deferred, jax.tree.map(lambda x: x[0], parts))
    add_to = lambda total, part: (jax.tree.map(jnp.add, total, gradient(deferred, part)), None)  # noqa: E731
    (grads, (loss, metric)), _ = jax.lax.scan(add_to, first, jax.tree.map(lambda x: x[1:], parts))
  scale = jnp.where(loss.den > 0, 1.0 / jnp.where(loss.den > 0, loss.den, 1.0), 0.0)
  return jax.tree.map(lambda g: g * scale, reduce_gradients(grads, params)), metric


def split_batch(x: jax.Array, microbatches: int) -> jax.Array:
  """[B, ...] -> [M, B / M, ...]; micro-batch m takes every M-th row from m on, so that no row changes its device."""
  shape = (x.shape[0] // microbatches, microbatches, *x.shape[1:])
  if not is_sharded():
    return x.reshape(shape).swapaxes(0, 1)
  return jax.lax.reshape(x, shape, out_sharding=spec(shape, "batch", *[None] * x.ndim)).swapaxes(
    0, 1
  )
