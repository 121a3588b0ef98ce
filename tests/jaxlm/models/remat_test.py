"""Recomputation changes memory, not results."""

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, decoder
from jaxlm.models import Transformer
from jaxlm.objectives import next_token_loss

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

POLICIES = ("none", "dots", "names", "full")


def model_and_loss(compute):
  ids_BT = np.random.default_rng(0).integers(0, 32, (8, 64))
  weights_BT = np.ones((8, 64), np.float32)
  model = Transformer(decoder(V=32, D=32, F=96, N=2, K=2, H=16, layers=6), compute)

  def loss(params):
    states_BTD = model.apply(params, ids_BT, logits=False)
    return next_token_loss(states_BTD, model.head(params), ids_BT, weights_BT)["loss"].mean()

  return model, loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_recomputation_a_layer_keeps_each_product_s_input_once(dtype):
  """Width D: what both norms take and give, and what o takes; F: gate, up and what down takes."""
  model, loss = model_and_loss(ComputeConfig(dtype=dtype, scan="always"))
  params = jax.eval_shape(model.init, jax.random.key(0))
  kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
  by_width = {width: [x.dtype for x in kept if x.shape == (6, 8, 64, width)] for width in (32, 96)}
  assert by_width == {32: [dtype] * 5, 96: [dtype] * 3}


@pytest.fixture(scope="module")
def compiled():
  """Loss and gradients by policy: compiled programs, and their results on the same inputs."""
  programs, results, params = {}, {}, None
  for policy in POLICIES:
    model, loss = model_and_loss(ComputeConfig(scan="always", remat=policy))
    if params is None:
      params = model.init(jax.random.key(0))
    programs[policy] = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    results[policy] = jax.device_get(programs[policy](params))
  return programs, results


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_loss_and_gradients_equal_those_without(compiled, policy):
  _, results = compiled
  (want_loss, want_grads), (loss, grads) = results["none"], results[policy]
  assert loss == pytest.approx(want_loss, rel=1e-6)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_grads))
  chex.assert_trees_all_close(grads, want_grads, rtol=0, atol=1e-6 * scale)


def test_memory_is_ordered(compiled):
  programs, _ = compiled
  size = {
    policy: program.memory_analysis().temp_size_in_bytes for policy, program in programs.items()
  }
  assert (
    size["full"] < size["names"] < size["none"] and size["full"] < size["dots"] < size["none"]
  ), size


def test_full_recomputes_one_forward_pass(compiled):
  """The program of `full` has the products of `none` and at most one more forward of a block."""
  programs, _ = compiled
  flops = {policy: program.cost_analysis()["flops"] for policy, program in programs.items()}
  assert (
    1.1 < flops["full"] / flops["none"] < 1.4 and flops["none"] <= flops["dots"] < flops["full"]
  ), flops
