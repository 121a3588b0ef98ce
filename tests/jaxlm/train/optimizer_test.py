"""Decay by role, and the update rules on small trees."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlm.config import OptimizerConfig, TrainConfig, decoder
from jaxlm.models import Transformer
from jaxlm.run.text import TextTask
from jaxlm.train.optimizer import DECAYED, make_optimizer, update
from pallas_kernels.common.errors import UserError

BASE = OptimizerConfig(learning_rate=1.0, warmup=10, final=0.1, decay=0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_hits_the_matrices_of_blocks_and_head_alone(tied):
  config = decoder(V=8, D=8, F=12, N=2, K=1, H=4, layers=2, windows=(5, None), tied=tied)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  roles = TextTask(TrainConfig(model=config)).roles(params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, role in jax.tree.leaves_with_path(roles)
    if role in DECAYED
  }
  matrices = {f"mixer/{name}/weight" for name in "qkvo"}
  matrices |= {f"feedforward/{name}/weight" for name in ("gate", "up", "down")}
  want = {f"stacks/0/{place}/{name}" for place in "01" for name in matrices}
  assert decayed == want | (set() if tied else {"head/weight"})


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_decay_is_decoupled_and_times_the_learning_rate(name):
  """With gradients of zero only decay moves a weight: w - rate * decay * w."""
  config = dataclasses.replace(
    BASE, name=name, schedule="constant", warmup=0, learning_rate=0.1, weight_decay=0.5
  )
  params = {
    "head": np.ones((4, 6), np.float32),
    "norm": np.ones(4, np.float32),
    "stack": {"w": np.ones((2, 4, 4), np.float32), "norm": np.ones((2, 4), np.float32)},
  }
  roles = {"head": "head", "norm": "norm", "stack": {"w": "matrix", "norm": "norm"}}
  grads = jax.tree.map(np.zeros_like, params)
  optimizer = make_optimizer(config, roles)

  @jax.jit
  def step(grads, params):
    state = optimizer.init(params)
    return update(optimizer, roles, grads, state, params, rate=0.1, weight_decay=0.5)

  after, _ = step(grads, params)
  np.testing.assert_allclose(after["head"], 0.95, rtol=1e-5)
  np.testing.assert_allclose(after["stack"]["w"], 0.95, rtol=1e-5)
  np.testing.assert_array_equal(after["norm"], 1)
  np.testing.assert_array_equal(after["stack"]["norm"], 1)


@pytest.mark.parametrize(
  "config, message",
  [
    (dataclasses.replace(BASE, weight_decay=0.5), r"optimizer\.weight_decay=0\.5: decays matrix"),
    (dataclasses.replace(BASE, name="muon", weight_decay=0.0), "'muon': needs a matrix"),
  ],
  ids=["weight decay", "muon"],
)
def test_a_rule_that_hits_no_parameter_is_refused(config, message):
  with pytest.raises(UserError, match=message):
    make_optimizer(config, {"w": "other"})


def test_adafactor_clips_each_layer_of_a_stack_by_itself():
  """A stack of matrices moves exactly as the same matrices do one by one."""
  config = dataclasses.replace(BASE, name="adafactor", weight_decay=0.0)
  draw = np.random.default_rng(0)
  grads = draw.normal(size=(3, 130, 140)).astype(np.float32)
  grads[1, 0, 0] = 1e4  # one outlier, which the clipping of its own layer alone may answer to

  @functools.partial(jax.jit, static_argnums=2)
  def directions(params, grads, role):
    optimizer = make_optimizer(config, jax.tree.map(lambda _: role, params))
    state = optimizer.init(params)
    for _ in range(2):
      direction, state = optimizer.update(grads, state, params)
    return direction

  whole = directions({"w": np.zeros_like(grads)}, {"w": grads}, "matrix")["w"]
  for layer in range(3):
    single = directions({"w": np.zeros_like(grads[layer])}, {"w": grads[layer]}, "matrix")["w"]
    np.testing.assert_allclose(whole[layer], single, rtol=1e-5, atol=1e-6)
  as_one = directions({"w": np.zeros_like(grads)}, {"w": grads}, "other")["w"]
  assert np.abs(as_one - whole).max() > 0.01  # so that the test above cannot pass by chance


def newton_schulz(gradient_DF: np.ndarray) -> np.ndarray:
  """Returns the gradient [D, F], D <= F, after the five iterations of Jordan 2024, in float64."""
  x_DF = gradient_DF / np.linalg.norm(gradient_DF)
  for _ in range(5):
    product_DD = x_DF @ x_DF.T
    step_DD = -4.7750 * product_DD + 2.0315 * product_DD @ product_DD
    x_DF = 3.4445 * x_DF + step_DD @ x_DF
  return x_DF


def test_muon_orthogonalises_each_layer_and_scales_it_to_its_root_mean_square():
  """Liu et al. 2025, equation 4: muon_scale * sqrt(max(D, F)) times the orthogonal matrix."""
  config = dataclasses.replace(
    BASE,
    name="muon",
    schedule="constant",
    warmup=0,
    learning_rate=0.1,
    weight_decay=0.0,
    muon_scale=0.2,
  )
  draw = np.random.default_rng(0)
  params = {
    "head": np.zeros((8, 16), np.float32),
    "stack": {"w": np.zeros((3, 8, 16), np.float32)},
  }
  roles = {"head": "head", "stack": {"w": "matrix"}}
  grads = jax.tree.map(lambda w: draw.normal(size=w.shape).astype(np.float32), params)
  optimizer = make_optimizer(config, roles)
  directions, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  for direction, gradient in zip(directions["stack"]["w"], grads["stack"]["w"]):
    want = 0.2 * np.sqrt(16) * newton_schulz(np.float64(gradient))
    np.testing.assert_allclose(direction, want, rtol=1e-4, atol=1e-4)
    singular = np.linalg.svd(direction, compute_uv=False)
    assert singular.max() / singular.min() < 2.5  # the iterations leave 0.7 to 1.2
  # adam's first step has one size, and Nesterov's factor below 2
  head_DV = np.asarray(directions["head"])
  np.testing.assert_array_equal(np.sign(head_DV), np.sign(grads["head"]))
  np.testing.assert_allclose(np.abs(head_DV), np.abs(head_DV[0, 0]), rtol=1e-3)
  assert 1 < np.abs(head_DV[0, 0]) < 2
