import jax
import numpy as np

from jaxlm.models.mlp import swiglu


def test_swiglu_has_the_gradients_of_silu_times_up():
  draw = np.random.default_rng(0)
  gate, up, dy = (draw.normal(size=(64, 96)) for _ in range(3))
  gate = 4 * gate
  y, pull = jax.vjp(swiglu, gate.astype(np.float32), up.astype(np.float32))
  share = 1 / (1 + np.exp(-gate))  # in float64
  np.testing.assert_allclose(y, gate * share * up, atol=1e-5)
  dgate, dup = pull(dy.astype(np.float32))
  np.testing.assert_allclose(dgate, dy * up * (share + gate * share * (1 - share)), atol=1e-5)
  np.testing.assert_allclose(dup, dy * gate * share, atol=1e-5)


def test_swiglu_of_extreme_gates_is_finite_with_gradients():
  gate = np.float32([-1e30, -1e4, -90, -20, 0, 20, 90, 1e4, 1e30])
  y, pull = jax.vjp(swiglu, gate, np.ones_like(gate))
  dgate, dup = pull(np.ones_like(gate))
  np.testing.assert_allclose(dgate, [0, 0, 0, 0, 0.5, 1, 1, 1, 1], atol=2e-6)
  np.testing.assert_allclose(y, np.maximum(gate, 0), atol=1e-6, rtol=1e-6)
  np.testing.assert_allclose(dup, np.maximum(gate, 0), atol=1e-6, rtol=1e-6)


def test_swiglu_keeps_only_its_arguments():
  x = np.ones((8, 16), np.float32)
  _, pull = jax.eval_shape(lambda gate, up: jax.vjp(swiglu, gate, up), x, x)
  assert sorted(kept.shape for kept in jax.tree.leaves(pull)) == [x.shape, x.shape]
