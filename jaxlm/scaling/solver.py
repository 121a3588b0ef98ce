"""Minimises a Huber loss of residuals in float64, for many starts and resamples at once.

The fit of a law to runs is a small, badly conditioned least-absolute problem: most residuals exceed
the Huber threshold that papers use. A damped Gauss-Newton step on reweighted squares (Levenberg and
Marquardt; weights min(1, delta / |r|)) reaches the optimum from any of a few starts where L-BFGS
with default tolerances stops early.
"""

# X runs, P fitted numbers, S problems (starts times resamples)

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Residual = Callable[[jax.Array, Any], jax.Array]
"""residual(numbers_P, data) -> float64 [X]"""
ITERATIONS = 500
TOLERANCE = 1e-9


class Minimum(NamedTuple):
  """Holds what one problem ended with."""

  numbers_P: np.ndarray
  objective: np.ndarray
  iterations: np.ndarray


class _State(NamedTuple):
  numbers_P: jax.Array
  objective: jax.Array
  damping: jax.Array
  stalled: jax.Array
  iterations: jax.Array


def minimize(
  residual: Residual, starts_SP: Any, data: Any, weights_SX: Any, *, delta: float
) -> Minimum:
  """Returns the minima of sum_x weight_x huber_delta(residual_x) from S starts, each leaf [S, ...].

  The sum, never the mean: with a mean, tolerances stop the search far from the optimum.
  `weights_SX` count how often a resample holds each run. `data` is shared by all problems; float64
  throughout, whatever jax's configuration says.
  """
  with jax.enable_x64(True):
    numbers = jax.tree.map(
      lambda a: np.asarray(a, np.float64), (starts_SP, data, weights_SX, delta)
    )
    result = _minimize_all(residual, *numbers)
    return Minimum(*map(np.asarray, result))


def huber(residual: jax.Array, delta: jax.Array) -> jax.Array:
  """Returns r^2 / 2 within delta of 0 and delta (|r| - delta / 2) beyond, elementwise."""
  size = jnp.abs(residual)
  return jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@functools.partial(jax.jit, static_argnums=0)
def _minimize_all(
  residual: Residual, starts_SP: jax.Array, data: Any, weights_SX: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  def one(start_P: jax.Array, weights_X: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    end = _descend(residual, start_P, data, weights_X, delta)
    return end.numbers_P, end.objective, end.iterations

  return jax.vmap(one)(starts_SP, weights_SX)


def _descend(
  residual: Residual, start_P: jax.Array, data: Any, weights_X: jax.Array, delta: jax.Array
) -> _State:
  def objective(numbers_P: jax.Array) -> jax.Array:
    total = jnp.sum(weights_X * huber(residual(numbers_P, data), delta))
    return jnp.where(jnp.isfinite(total), total, jnp.inf)

  def step(state: _State) -> _State:
    r_X = residual(state.numbers_P, data)
    J_XP = jax.jacfwd(residual)(state.numbers_P, data)
    w_X = weights_X * jnp.minimum(1, delta / jnp.maximum(jnp.abs(r_X), 1e-300))
    gradient_P = J_XP.T @ (w_X * r_X)
    curvature_PP = J_XP.T @ (w_X[:, None] * J_XP)
    scale_P = jnp.diag(curvature_PP)
    scale_P = jnp.where(scale_P > 0, scale_P, 1.0)
    damped_PP = curvature_PP + jnp.diag(state.damping * scale_P)
    candidate_P = state.numbers_P - jnp.linalg.solve(damped_PP, gradient_P)
    value = objective(candidate_P)
    better = value < state.objective
    gained = (state.objective - value) > TOLERANCE * state.objective
    return _State(
      jnp.where(better, candidate_P, state.numbers_P),
      jnp.where(better, value, state.objective),
      jnp.clip(jnp.where(better, state.damping / 4, state.damping * 6), 1e-15, 1e15),
      jnp.where(gained, 0, state.stalled + 1),
      state.iterations + 1,
    )

  def goes_on(state: _State) -> jax.Array:
    return (state.stalled < 8) & (state.iterations < ITERATIONS)

  start = _State(start_P, objective(start_P), jnp.float64(1e-2), jnp.int32(0), jnp.int32(0))
  return jax.lax.while_loop(goes_on, step, start)
