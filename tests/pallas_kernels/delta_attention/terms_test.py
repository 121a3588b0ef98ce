"""Gradients of norm and gate that have no quotient, against automatic differentiation's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_attention.terms import NORM_EPSILON, normalise, softplus


@pytest.mark.parametrize("coarse", [False, True])
def test_the_norm_has_the_value_and_gradient_of_its_formula(coarse):
  scale = 0.3
  draw = np.random.default_rng(0)
  sizes = np.array([[0.0], [1e-3], [1.0], [1e3]])
  x, dy = (jnp.float32(sizes * draw.normal(size=(4, 16))), jnp.float32(draw.normal(size=(4, 16))))

  def plain(x):
    return scale * x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)

  y, pull = jax.vjp(lambda x: normalise(x, scale, coarse), x)
  true_y, true_pull = jax.vjp(plain, x)
  chex.assert_trees_all_close(y, true_y, rtol=1e-6)
  (dx,), (true_dx,) = pull(dy), true_pull(dy)
  size = np.abs(true_dx).max(axis=1, keepdims=True)
  chex.assert_trees_all_close(dx / size, true_dx / size, atol=2e-5)


def test_a_scale_of_zero_gives_zeros():
  dx = jax.grad(lambda x: jnp.sum(normalise(x, 0.0, False)))(jnp.ones((2, 4)))
  chex.assert_trees_all_equal(dx, jnp.zeros((2, 4)))


@pytest.mark.parametrize("coarse", [False, True])
def test_softplus_and_its_gradient_hold_at_every_size(coarse):
  x = jnp.float32([-np.inf, -100, -20, -7, -0.5, 0, 0.5, 7, 20, 100, np.inf])
  tolerance = 1e-3 if coarse else 1e-6
  chex.assert_trees_all_close(softplus(x, coarse), jax.nn.softplus(x), rtol=tolerance)
  slope = jax.vmap(jax.grad(lambda x: softplus(x, coarse)))(x)
  chex.assert_trees_all_close(slope, jax.nn.sigmoid(x), rtol=tolerance)
