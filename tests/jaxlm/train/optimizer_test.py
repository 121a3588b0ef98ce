import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxlm.config import OptimizerConfig, decoder
from jaxlm.models import Transformer
from jaxlm.train.optimizer import decay_mask, learning_rate_schedule, make_optimizer

STEPS = 100
BASE = OptimizerConfig(learning_rate=1.0, warmup=10, final=0.1, decay=0.2)


def rate(schedule: str, *steps: int, **changes) -> list[float]:
  config = dataclasses.replace(BASE, schedule=schedule, **changes)
  return [float(learning_rate_schedule(config, STEPS)(step)) for step in steps]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_warmup_is_linear_and_its_first_step_moves(schedule):
  """(step + 1) / 11 up to the peak at step 10."""
  assert rate(schedule, 0, 4, 9, 10) == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1], abs=1e-6)


def test_schedules_at_points_computed_by_hand():
  # 90 steps after the warm-up: half-way is step 55; cosine there is (1 + 0.1) / 2; a third is cos(60 degrees) = 1/2
  assert rate("cosine", 40, 55, 100, 150) == pytest.approx(
    [0.1 + 0.9 * 0.75, 0.55, 0.1, 0.1], abs=1e-6
  )
  assert rate("linear", 55, 100, 150) == pytest.approx([0.55, 0.1, 0.1], abs=1e-6)
  assert rate("constant", 55, 99, 1000) == [1, 1, 1]
  # stable until the last 20 steps, then linear from 1 to 0.1
  assert rate("wsd", 11, 80, 90, 100) == pytest.approx([1, 1, 0.55, 0.1], abs=1e-6)
  assert rate("wsd", 90, 95, 100, decay=0.1, final=0.0) == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_no_warmup_starts_at_the_peak():
  assert rate("linear", 0, 50, 100, warmup=0) == pytest.approx([1, 0.55, 0.1], abs=1e-6)


def test_a_decay_longer_than_what_follows_the_warmup_begins_right_after_it():
  assert rate("wsd", 10, 55, 100, decay=1.0) == pytest.approx([1, 0.55, 0.1], abs=1e-6)


def test_a_warmup_that_leaves_no_step_is_refused():
  with pytest.raises(ValueError, match=r"optimizer\.warmup=100: must be below steps=100"):
    learning_rate_schedule(dataclasses.replace(BASE, warmup=100), 100)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_hits_the_matrices_of_blocks_and_head_alone(tied):
  config = decoder(V=8, D=8, F=12, N=2, K=1, H=4, layers=2, windows=(5, None), tied=tied)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  mask = decay_mask(params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, on in jax.tree.leaves_with_path(mask)
    if on
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
    "head": {"weight": np.ones((4, 6), np.float32)},
    "norm": {"weight": np.ones(4, np.float32)},
    "stacks": {"0": {"w": np.ones((2, 4, 4), np.float32), "w_D": np.ones((2, 4), np.float32)}},
  }
  optimizer = make_optimizer(config, STEPS)
  updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(after["head"]["weight"], 0.95, rtol=1e-5)
  np.testing.assert_allclose(after["stacks"]["0"]["w"], 0.95, rtol=1e-5)
  np.testing.assert_array_equal(after["norm"]["weight"], 1)
  np.testing.assert_array_equal(after["stacks"]["0"]["w_D"], 1)


def test_muon_orthogonalises_each_layers_matrix_to_its_root_mean_square():
  """Block matrices move by muon_scale * rate in root mean square, all singular values alike; the head as adam does."""
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
    "head": {"weight": np.zeros((8, 16), np.float32)},
    "stacks": {"0": {"w": np.zeros((3, 8, 16), np.float32)}},
  }
  grads = jax.tree.map(lambda w: draw.normal(size=w.shape).astype(np.float32), params)
  optimizer = make_optimizer(config, STEPS)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  for layer in np.asarray(updates["stacks"]["0"]["w"]):
    assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.02, rel=0.3)
    singular = np.linalg.svd(layer, compute_uv=False)
    assert singular.max() / singular.min() < 2.5  # Newton-Schulz iterations leave 0.7 to 1.2
  head_DV = np.asarray(
    updates["head"]["weight"]
  )  # adam's first step has one size, and Nesterov's factor below 2
  np.testing.assert_array_equal(np.sign(head_DV), -np.sign(grads["head"]["weight"]))
  np.testing.assert_allclose(np.abs(head_DV), np.abs(head_DV[0, 0]), rtol=1e-3)
  assert 0.1 < np.abs(head_DV[0, 0]) < 0.2
