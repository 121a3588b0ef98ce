"""Learns rotations by Cayley SGD on the loss of the quantised model (SpinQuant, arXiv 2405.16406).

Li et al. 2020 (Efficient Riemannian optimization on the Stiefel manifold, arXiv 2002.01113) is the
optimizer. The weights stay as they are; only R1 and R2 move, along orthogonal matrices.
"""

# n order of a rotation

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.quant.rotation import check_folded, draw_rotations, rotate_heads, rotate_residual

Params = dict[str, Any]
Loss = Callable[[Params, Any], jax.Array]


class Rotations(NamedTuple):
  """Holds R1 [D, D], and R2 [R, H, H] of each block of each stack."""

  r1: jax.Array
  r2: list[jax.Array]


_ITERATIONS = 7
"""the published five leave 1.3e-4 of X X^T - I after a long step, these 1e-5"""


def cayley_step(x_nn: jax.Array, gradient_nn: jax.Array, rate: jax.Array) -> jax.Array:
  """Returns an orthogonal matrix one step down the gradient, by a fixed-point iteration.

  Algorithm 1 of Li et al. without momentum: the published SpinQuant code never writes its momentum
  back. The step is shortened where the skew matrix is large.
  """
  u = x_nn / jnp.linalg.norm(x_nn, axis=1, keepdims=True)
  v = -gradient_nn.T
  mx = v @ u
  what = mx - 0.5 * u.T @ (u @ mx)
  skew = what - what.T
  tau = jnp.minimum(1 / (jnp.max(jnp.sum(jnp.abs(skew), axis=0)) + 1e-8), rate)
  y = u.T + tau * v
  for _ in range(_ITERATIONS):
    y = u.T + tau * skew @ ((u.T + y) / 2)
  return y.T


def orthonormal(x_nn: jax.Array) -> jax.Array:
  """Returns the nearest orthogonal matrix: the polar factor."""
  u, _, vh = jnp.linalg.svd(x_nn, full_matrices=False)
  return u @ vh


def learn_rotations(
  config: ModelConfig,
  params: Params,
  loss: Loss,
  batches: Iterable[Any],
  *,
  key: jax.Array,
  steps: int = 100,
  rate: float = 1.5,
  start: Rotations | None = None,
) -> Rotations:
  """Returns R1 and R2 after Cayley SGD with a cosine rate, re-orthonormalised at the end.

  `params` are folded (`rotation.fold_norms`), `loss(rotated params, batch)` is that of the
  quantised model, whose formats pass gradients through. `start` is by default random Hadamard
  matrices.
  """
  check_folded(config, params)
  if start is None:
    start = Rotations(*draw_rotations(config, key))
  rotations = start
  for index, batch in zip(range(steps), batches):
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * index / steps))
    rotations = _step(config, loss, params, rotations, batch, rate * cosine)
  return jax.tree.map(orthonormal, rotations)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
  config: ModelConfig,
  loss: Loss,
  params: Params,
  rotations: Rotations,
  batch: Any,
  rate: jax.Array,
) -> Rotations:
  """Returns the rotations one step down the gradient; compiled once for each `loss`."""

  def rotated_loss(rotations: Rotations) -> jax.Array:
    turned = rotate_residual(config, params, rotations.r1)
    return loss(rotate_heads(config, turned, rotations.r2), batch)

  move = functools.partial(cayley_step, rate=rate)

  def move_stack(x: jax.Array, g: jax.Array) -> jax.Array:
    return move(x, g) if x.ndim == 2 else jax.vmap(move)(x, g)

  return jax.tree.map(move_stack, rotations, jax.grad(rotated_loss)(rotations))
