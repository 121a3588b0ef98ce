"""Next-token cross-entropy: by hand, against log_softmax, and on a mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.models import Head
from jaxlm.objectives import next_token_loss, token_logprobs
from pallas_kernels.common.errors import UserError
from sharding import make_mesh
from sharding.rules import shard

# an identity as head makes the states the logits
STATES = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32))
HEAD = Head(np.eye(3, dtype=np.float32), "vd", None)
TARGETS = np.array([[1, 2]], np.int32)


class ByHand(chex.TestCase):
  """Values on two tokens of three entries, compiled and not."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_logprobs_and_the_normaliser(self):
    """Adding a constant to the logits moves only the normaliser."""
    logprobs = self.variant(lambda states_BTD: token_logprobs(states_BTD, HEAD, TARGETS))
    lp_BT, lse_BT = logprobs(STATES + 3)
    chex.assert_type((lp_BT, lse_BT), jnp.float32)
    np.testing.assert_allclose(lp_BT, np.log([[0.25, 0.7]]), atol=1e-6)
    np.testing.assert_allclose(lse_BT, [[3, 3]], atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_loss_is_a_weighted_sum_with_its_weights(self):
    terms = self.variant(lambda weights_BT: next_token_loss(STATES, HEAD, TARGETS, weights_BT))
    loss = terms(np.array([[2.0, 0.5]], np.float32))["loss"]
    chex.assert_shape((loss.num, loss.den), ())
    assert loss.num == pytest.approx(-2 * np.log(0.25) - 0.5 * np.log(0.7))
    assert loss.den == 2.5


WEIGHTS = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
  "arrays, message",
  [
    ((STATES[0], TARGETS, WEIGHTS), r"states_BTD.shape=\(2, 3\): must"),
    ((STATES.astype(np.int32), TARGETS, WEIGHTS), "states_BTD.dtype='int32': must"),
    ((STATES, TARGETS.T, WEIGHTS), r"targets_BT.shape=\(2, 1\): must"),
    ((STATES, TARGETS.astype(np.float32), WEIGHTS), "targets_BT.dtype='float32': must"),
    ((STATES, TARGETS, WEIGHTS.T), r"weights_BT.shape=\(2, 1\): must"),
  ],
)
def test_arrays_that_do_not_fit_are_named(arrays, message):
  """Transposed targets and weights have as many tokens, in another order."""
  states_BTD, targets_BT, weights_BT = arrays
  with pytest.raises(UserError, match=message):
    next_token_loss(states_BTD, HEAD, targets_BT, weights_BT)


def test_gradient_of_logprobs_reaches_states_and_head():
  draw = np.random.default_rng(0)
  states_BTD, w_DV = (draw.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (5, 7)))
  targets_BT, factors_BT = draw.integers(0, 7, (2, 3)), draw.normal(size=(2, 3))

  def by_hand(states_BTD, w_DV):
    lp_BTV = jax.nn.log_softmax(4 * jnp.tanh(states_BTD @ w_DV / 4))
    return jnp.sum(factors_BT * jnp.take_along_axis(lp_BTV, targets_BT[..., None], axis=2)[..., 0])

  def ours(states_BTD, w_DV):
    return jnp.sum(factors_BT * token_logprobs(states_BTD, Head(w_DV, "dv", 4.0), targets_BT)[0])

  want, got = (jax.jit(jax.value_and_grad(f, (0, 1)))(states_BTD, w_DV) for f in (by_hand, ours))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_logprobs_on_a_mesh_are_spread_like_the_tokens():
  draw = np.random.default_rng(0)
  states_BTD, w_VD = (draw.normal(size=shape).astype(np.float32) for shape in ((4, 3, 5), (8, 5)))
  targets_BT = draw.integers(0, 8, (4, 3)).astype(np.int32)
  logprobs = jax.jit(lambda x, w, targets: token_logprobs(x, Head(w, "vd", None), targets))
  want = logprobs(states_BTD, w_VD, targets_BT)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    placed = (
      shard(states_BTD, "batch", None, None),
      shard(w_VD, "vocab", None),
      shard(targets_BT, "batch", None),
    )
    got = logprobs(*placed)
    assert {x.sharding.spec for x in got} == {P(("data", "fsdp"), None)}
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_z_loss_is_the_weighted_squared_normaliser():
  """Normalisers of e^3 add 0.1 (1 * 9 + 0.5 * 9) to what is minimised, not to the metric."""
  weights_BT = np.array([[1.0, 0.5]], np.float32)
  terms = next_token_loss(STATES + 3, HEAD, TARGETS, weights_BT, z_loss=0.1)
  minimised, plain = terms["loss_with_z"], terms["loss"]
  assert (minimised.weight, plain.weight) == (1, 0)
  assert minimised.num - plain.num == pytest.approx(0.1 * 1.5 * 9, rel=1e-5)
  assert minimised.den == plain.den == 1.5
  assert plain.num == pytest.approx(-np.log(0.25) - 0.5 * np.log(0.7), rel=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_masked_positions_have_no_gradient_whatever_they_hold_and_others_that_of_softmax(z_loss):
  weights_BT = np.array([[1.0, 0.0]], np.float32)
  states_BTD, targets_BT = STATES.copy(), np.array([[1, -7]], np.int32)
  states_BTD[0, 1] = np.nan

  def minimised(states_BTD):
    terms = next_token_loss(states_BTD, HEAD, targets_BT, weights_BT, z_loss)
    return sum(term.weight * term.num for term in terms.values() if term.weight)

  gradient = jax.jit(jax.grad(minimised))(states_BTD)
  np.testing.assert_allclose(
    gradient, [[[0.5, -0.75, 0.25], [0, 0, 0]]], atol=1e-6
  )  # lse is 0: z adds nothing


def test_half_precision_products_are_reduced_in_float32():
  draw = np.random.default_rng(0)
  states_BTD, w_DV = (
    draw.normal(size=shape).astype(jnp.bfloat16) for shape in ((1, 4, 8), (8, 5000))
  )
  targets_BT = np.zeros((1, 4), np.int32)
  logprobs = jax.jit(lambda x, w: token_logprobs(x, Head(w, "dv", None), targets_BT))
  lp_BT, lse_BT = logprobs(states_BTD, w_DV)
  chex.assert_type((lp_BT, lse_BT), jnp.float32)
  exact = np.asarray(states_BTD, np.float64) @ np.asarray(w_DV, np.float64)
  np.testing.assert_allclose(lse_BT, np.log(np.exp(exact).sum(-1)), atol=1e-5)
