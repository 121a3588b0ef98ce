"""The shared mathematics against JAX's own functions and gradients, compiled and not."""

# N tokens, D model, V vocabulary
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Options, RowFactors, Statistics

N, V = 5, 12
OPTIONS = Options(
  vocabulary=V, softcap=3.0, temperature=0.7, label_smoothing=0.2, z_loss=0.1, layout="dv"
)


def products_and_labels():
  rng = np.random.default_rng(0)
  return jnp.float32(2 * rng.normal(size=(N, V))), jnp.asarray(rng.integers(0, V, N), jnp.int32)


def statistics(x_NV, labels_N):
  target_N = jnp.take_along_axis(x_NV, labels_N[:, None], axis=1)[:, 0]
  return Statistics(jax.nn.logsumexp(x_NV, axis=1), target_N, x_NV.sum(axis=1))


class TermsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_gradient_of_the_products(self):
    """row_factors, logit_gradient and logit_slope together are the derivative of the row loss."""
    products_NV, labels_N = products_and_labels()
    weight_N = jnp.float32([1, 0.5, 0, 2, -1])

    def loss(products_NV):
      x_NV = terms.logits(products_NV, None, OPTIONS)
      return terms.total_loss(statistics(x_NV, labels_N), weight_N, OPTIONS)

    @self.variant
    def written_out(products_NV):
      x_NV = terms.logits(products_NV, None, OPTIONS)
      stats = statistics(x_NV, labels_N)
      factors = terms.row_factors(stats, jax.grad(terms.total_loss)(stats, weight_N, OPTIONS))
      factors = RowFactors(*(factor_N[:, None] for factor_N in factors))
      hit_NV = jnp.arange(V)[None] == labels_N[:, None]
      gradient_NV = terms.logit_gradient(x_NV, hit_NV, factors, OPTIONS)
      return gradient_NV * terms.logit_slope(x_NV, OPTIONS)

    want = jax.jit(jax.grad(loss))(products_NV)
    chex.assert_trees_all_close(written_out(products_NV), want, rtol=1e-5, atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_running_log_sum_exp_survives_infinities(self):
    x_NV = jnp.stack(
      [
        jnp.arange(V, dtype=jnp.float32),
        jnp.full(V, -jnp.inf),
        jnp.where(jnp.arange(V) < 6, -jnp.inf, 1.0),
        jnp.full(V, 1e30),
      ]
    )

    @self.variant
    def by_tiles(x_NV):
      top_N, mass_N = jnp.full(len(x_NV), -jnp.inf), jnp.zeros(len(x_NV))
      for tile in jnp.split(x_NV, 3, axis=1):
        top_N, mass_N = terms.add_exponentials(top_N, mass_N, tile, axis=1)
      return terms.log_sum_exp(top_N, mass_N)

    chex.assert_trees_all_close(by_tiles(x_NV), jax.nn.logsumexp(x_NV, axis=1), rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_a_filter_never_drops_nan(self):
    def some_pass(gradient_N):
      factors = RowFactors(None, None, None, None, unit_N=jnp.ones(3), active_N=None)
      return terms.passes_filter(gradient_N, factors, 0.5)

    passes = self.variant(some_pass)
    gradients = jnp.float32([[0.1, -0.4, 0.0], [0.1, -0.5, 0.0], [0.1, jnp.nan, 0.0]])
    assert [bool(passes(row)) for row in gradients] == [False, True, True]


def test_options_refuse_what_is_out_of_range():
  for field, value in (("temperature", 0.0), ("softcap", -1.0), ("label_smoothing", 1.0)):
    with pytest.raises(UserError, match=f"{field}={value}"):
      Options(vocabulary=V, **{field: value})
