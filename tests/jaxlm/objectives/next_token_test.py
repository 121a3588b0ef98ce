import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import next_token_loss, token_logprobs

LOGITS = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32))
TARGETS = np.array([[1, 2]], np.int32)


def test_logprobs_by_hand_and_the_normaliser():
  """Adding a constant to the logits moves only the normaliser."""
  lp_BT, lse_BT = token_logprobs(LOGITS + 3, TARGETS)
  np.testing.assert_allclose(lp_BT, np.log([[0.25, 0.7]]), atol=1e-6)
  np.testing.assert_allclose(lse_BT, [[3, 3]], atol=1e-6)


def test_loss_is_a_weighted_sum_with_its_weights():
  _, loss = next_token_loss(LOGITS, TARGETS, np.array([[2.0, 0.5]], np.float32))
  assert loss.num == pytest.approx(-2 * np.log(0.25) - 0.5 * np.log(0.7))
  assert loss.den == 2.5


def test_z_loss_is_the_weighted_squared_normaliser():
  """Normalisers e^3: 0.1 (1 * 9 + 0.5 * 9) on top of the cross-entropy, which is reported without it."""
  weights_BT = np.array([[1.0, 0.5]], np.float32)
  minimised, plain = next_token_loss(LOGITS + 3, TARGETS, weights_BT, z_loss=0.1)
  assert minimised.num - plain.num == pytest.approx(0.1 * 1.5 * 9, rel=1e-5)
  assert minimised.den == plain.den == 1.5
  assert plain.num == pytest.approx(-np.log(0.25) - 0.5 * np.log(0.7), rel=1e-5)


def test_masked_positions_have_no_gradient_and_others_that_of_softmax():
  weights_BT = np.array([[1.0, 0.0]], np.float32)
  gradient_BTV = jax.grad(lambda x: next_token_loss(x, TARGETS, weights_BT)[0].num)(LOGITS)
  np.testing.assert_allclose(gradient_BTV, [[[0.5, -0.75, 0.25], [0, 0, 0]]], atol=1e-6)


def test_half_precision_logits_are_reduced_in_float32():
  draw = np.random.default_rng(0)
  logits_BTV = jnp.asarray(draw.normal(size=(1, 4, 5000)), jnp.bfloat16)
  lp_BT, lse_BT = token_logprobs(logits_BTV, np.zeros((1, 4), np.int32))
  assert lp_BT.dtype == lse_BT.dtype == jnp.float32
  exact = np.asarray(logits_BTV, np.float64)
  np.testing.assert_allclose(lse_BT, np.log(np.exp(exact).sum(-1)), atol=1e-5)
