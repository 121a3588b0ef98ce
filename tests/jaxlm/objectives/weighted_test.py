"""Sums of losses, compiled and not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.objectives import Weighted


class Sums(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_parts_add_to_the_mean_of_all(self):
    """With as many terms in one part as one wants: 3 of weight 2 and 1 of weight 0.5."""
    values, weights = np.float32([1, 5, 2, 8]), np.float32([2, 2, 2, 0.5])

    def mean(values, weights):
      parts = [
        Weighted(jnp.sum(values[part] * weights[part]), jnp.sum(weights[part]), weight=0.5)
        for part in (slice(0, 3), slice(3, 4))
      ]
      both = parts[0].plus(parts[1])
      assert both.weight == 0.5
      return both.mean()

    got = self.variant(mean)(values, weights)
    chex.assert_trees_all_close(got, np.float32(20 / 6.5), rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_a_mean_of_nothing_is_zero_and_so_is_its_gradient(self):
    """Even where the sum of nothing is not a number."""
    mean = self.variant(jax.value_and_grad(lambda num: Weighted(num, jnp.float32(0)).mean()))
    for num in (3.0, jnp.nan, jnp.inf):
      chex.assert_trees_all_equal(mean(jnp.float32(num)), (jnp.float32(0), jnp.float32(0)))

  @chex.variants(with_jit=True, without_jit=True)
  def test_the_gradient_of_the_mean_is_that_of_the_sum_over_the_weights(self):
    slope = self.variant(jax.grad(lambda num: Weighted(num, jnp.float32(4)).mean()))
    chex.assert_trees_all_close(slope(jnp.float32(3)), jnp.float32(0.25))
