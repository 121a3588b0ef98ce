"""SwiGLU and its own backward pass, against float64."""

import chex
import jax
import numpy as np
import pytest

from jaxlm.models.feedforward.mlp import swiglu
from pallas_kernels.common.errors import UserError


def value_and_gradients(gate, up, dy):
  y, pull = jax.vjp(swiglu, gate, up)
  return y, *pull(dy)


class Swiglu(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_it_has_the_gradients_of_silu_times_up(self):
    draw = np.random.default_rng(0)
    gate, up, dy = (draw.normal(size=(64, 96)) for _ in range(3))
    gate = 4 * gate
    share = 1 / (1 + np.exp(-gate))
    slope = share + gate * share * (1 - share)
    got = self.variant(value_and_gradients)(*(np.float32(x) for x in (gate, up, dy)))
    want = np.float32(gate * share * up), np.float32(dy * up * slope), np.float32(dy * gate * share)
    chex.assert_trees_all_close(got, want, atol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_extreme_gates_are_finite_with_gradients(self):
    gate = np.float32([-1e30, -1e4, -90, -20, 0, 20, 90, 1e4, 1e30])
    one = np.ones_like(gate)
    y, dgate, dup = self.variant(value_and_gradients)(gate, one, one)
    # a sigmoid that is off by its last bit, times a gate of 20
    np.testing.assert_allclose(dgate, [0, 0, 0, 0, 0.5, 1, 1, 1, 1], atol=20 * 2**-23)
    want = np.maximum(gate, 0)
    chex.assert_trees_all_close((y, dup), (want, want), atol=20 * 2**-23, rtol=1e-6)


def test_swiglu_keeps_only_its_arguments():
  x = np.ones((8, 16), np.float32)
  _, pull = jax.eval_shape(lambda gate, up: jax.vjp(swiglu, gate, up), x, x)
  assert sorted(kept.shape for kept in jax.tree.leaves(pull)) == [x.shape, x.shape]


def test_a_factor_that_broadcasting_would_take_is_named():
  with pytest.raises(UserError, match=r"up_BTF.shape=\(8, 1\): must be \(8, 16\)"):
    swiglu(np.ones((8, 16)), np.ones((8, 1)))
