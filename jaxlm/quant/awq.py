"""Scales input channels by how active they are before rounding (Lin et al. 2023, arXiv 2306.00978).

And learns how far to clip, as OmniQuant does (Shao et al. 2023, arXiv 2308.13137).
"""

# F output channels, D contracted axis, Z samples

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from jaxlm.config.formats import Format
from jaxlm.quant.apply import quantize

GRID = 20


@functools.partial(jax.jit, static_argnums=2)
def find_scales(w_FD: jax.Array, activity_D: jax.Array, format: Format) -> jax.Array:
  """Returns factors [D] that input channels are divided by and weights multiplied by.

  They are activity^rho over the root of their largest times their smallest, with rho of 20 values
  from 0 to 1 chosen for the least ||(w - round(w s) / s) diag(activity)||; activity is mean |x|.
  The caller folds 1 / s into what makes the input: a norm's gain, or the output channels of `up`.
  """

  def scales(rho: jax.Array) -> jax.Array:
    s_D = jnp.maximum(activity_D, 1e-4) ** rho
    return s_D / jnp.sqrt(jnp.max(s_D) * jnp.min(s_D))

  def error(rho: jax.Array) -> jax.Array:
    s_D = scales(rho)[None]
    rounded_FD = quantize(w_FD * s_D, format) / s_D
    return jnp.sum(jnp.square((w_FD - rounded_FD) * activity_D[None]))

  grid = jnp.arange(GRID) / GRID
  return scales(grid[jnp.argmin(jax.lax.map(error, grid))])


def clipped_affine(w_FD: jax.Array, high_F: jax.Array, low_F: jax.Array, bits: int) -> jax.Array:
  """Returns weights on 2^bits levels from sigmoid(low) min to sigmoid(high) max of each row.

  Gradients reach the two bounds, straight through the rounding.
  """
  top = jax.nn.sigmoid(high_F)[:, None] * jnp.max(w_FD, axis=1, keepdims=True)
  bottom = jax.nn.sigmoid(low_F)[:, None] * jnp.min(w_FD, axis=1, keepdims=True)
  step = jnp.maximum((top - bottom) / (2**bits - 1), 1e-8)
  v_FD = w_FD / step - bottom / step
  v_FD = v_FD + jax.lax.stop_gradient(jnp.round(v_FD) - v_FD)
  return jnp.clip(v_FD, 0, 2**bits - 1) * step + bottom


def learn_clipping(
  w_FD: jax.Array, x_ZD: jax.Array, bits: int, *, steps: int = 100, rate: float = 1e-2
) -> tuple[jax.Array, jax.Array]:
  """Returns (high [F], low [F]) for `clipped_affine` that lower the error of x w^T, by Adam.

  Both start at 4, that is at 0.982 of the range.
  """
  optimizer = optax.adam(rate)

  def loss(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(x_ZD @ (clipped_affine(w_FD, *bounds, bits) - w_FD).T))

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    bounds, state = carry
    directions, state = optimizer.update(jax.grad(loss)(bounds), state)
    return (optax.apply_updates(bounds, directions), state), None

  start = (jnp.full(len(w_FD), 4.0), jnp.full(len(w_FD), 4.0))
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0][0])
  return run((start, optimizer.init(start)))
