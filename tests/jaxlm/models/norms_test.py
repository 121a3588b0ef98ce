"""RMSNorm against the formula in float64."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxlm.models.norms import rms_norm
from pallas_kernels.common.errors import UserError

EPS = 1e-3


def exact(x_BTD, w_D, offset):
  mean_square = np.mean(np.float64(x_BTD) ** 2, axis=-1, keepdims=True)
  return (offset + np.float64(w_D)) * np.float64(x_BTD) / np.sqrt(mean_square + EPS)


class Norms(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(0, 1)
  def test_values_are_the_formulas(self, offset):
    draw = np.random.default_rng(0)
    x_BTD = draw.normal(size=(2, 5, 64)).astype(np.float32)
    w_D = draw.normal(size=64).astype(np.float32)
    norm = self.variant(lambda x_BTD, w_D: rms_norm(x_BTD, w_D, EPS, offset))
    y_BTD = norm(x_BTD, w_D)
    chex.assert_equal_shape((x_BTD, y_BTD))
    np.testing.assert_allclose(y_BTD, exact(x_BTD, w_D, offset), rtol=1e-5, atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_half_precision_is_rounded_once_at_the_end(self):
    """Squares of these entries overflow float16."""
    draw = np.random.default_rng(1)
    x_BTD = (300 * draw.normal(size=(2, 5, 64))).astype(np.float16)
    w_D = draw.normal(size=64).astype(np.float32)
    y_BTD = self.variant(lambda x_BTD, w_D: rms_norm(x_BTD, w_D, EPS, 0))(x_BTD, w_D)
    chex.assert_type(y_BTD, jnp.float16)
    np.testing.assert_allclose(y_BTD, exact(x_BTD, w_D, 0), rtol=2**-10, atol=1e-6)


def test_a_weight_that_broadcasting_would_take_is_named():
  with pytest.raises(UserError, match=r"w_D.shape=\(1,\): must be \(64,\)"):
    rms_norm(np.ones((2, 5, 64)), np.ones(1), EPS, 0)
