"""Tasks of one's own through the training step: terms, keys, frozen weights, state, refusals."""

import dataclasses
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import OptimizerConfig, TrainConfig
from jaxlm.train import Hyper, IndexedBatches, Start, Task, Weighted, init_state, make_train_step
from jaxlm.train.accumulate import accumulated_gradients
from pallas_kernels.common.errors import UserError

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup=0, schedule="constant", weight_decay=0.0)
CONFIG = TrainConfig(steps=10, batch=12, ema=0.5, optimizer=OPTIMIZER)
DRAW = np.random.default_rng(0)
# x [12, 3], counts [12]: micro-batch m of 3 holds rows m, m + 3, ..., so that counts are unequal
BATCH = {
  "x": DRAW.normal(size=(12, 3)).astype(np.float32),
  "count": np.array([8, 1, 0, 3, 7, 0, 2, 5, 0, 8, 1, 0], np.float32),
}


class Regression(Task):
  """A frozen matrix, a trained vector and a state that counts; the loss is noisy by the key."""

  noise = 0.0

  def init(self, key):
    trained = {"w": jnp.arange(3.0)}
    frozen = {"table": jnp.eye(3)}
    return Start(trained, frozen, {"updates": jnp.int32(0), "largest": jnp.float32(0)})

  def batches(self, rows):
    return IndexedBatches(lambda index: {name: x[rows] for name, x in BATCH.items()})

  def objective(self, params, model_state, batch, key):
    y_B = jnp.sin(batch["x"] @ params["table"] @ params["w"])
    y_B = y_B + self.noise * jax.random.normal(key, y_B.shape)
    used_B = batch["count"] > 0
    return {
      "loss": Weighted(jnp.sum(batch["count"] * y_B**2), jnp.sum(batch["count"])),
      "rows": Weighted(jnp.sum(used_B * jnp.cos(y_B)), jnp.sum(used_B, dtype=jnp.float32), 0.3),
      "layers": Weighted(jnp.sum(params["w"] ** 2), jnp.float32(3), 0.01),
      "maxima": Weighted(jnp.abs(batch["x"]).max(axis=0), jnp.float32(1), 0.0),
    }

  def after_update(self, params, model_state, metrics):
    largest = jnp.maximum(model_state["largest"], metrics["maxima"].max())
    return params, {"updates": model_state["updates"] + 1, "largest": largest}


class Noisy(Regression):
  noise = 1.0


def gradients(task, microbatches, key=0):
  params, frozen, model_state = task.init(jax.random.key(0))

  def objective(params, batch, key):
    return task.objective(params | frozen, model_state, batch, key)

  run = jax.jit(accumulated_gradients, static_argnums=(0, 4))
  return run(objective, params, BATCH, jax.random.key(key), microbatches)


def test_terms_with_different_denominators_accumulate_exactly():
  want_grads, want = gradients(Regression(), 1)
  grads, terms = gradients(Regression(), 3)
  chex.assert_trees_all_close(grads, want_grads, rtol=1e-6)
  for name in ("loss", "rows", "layers"):
    assert float(terms[name].mean()) == pytest.approx(float(want[name].mean()), rel=1e-6)
  assert want["loss"].den == terms["loss"].den == 35
  assert want["rows"].den == terms["rows"].den == 8


def test_the_mean_of_the_micro_batches_gradients_is_something_else(monkeypatch):
  """So that the test above cannot pass by averaging: each micro-batch by itself, then the mean."""
  want = gradients(Regression(), 1)[0]["w"]
  parts = [{name: x[m::3] for name, x in BATCH.items()} for m in range(3)]
  each = []
  for part in parts:
    monkeypatch.setitem(globals(), "BATCH", part)
    each.append(gradients(Regression(), 1)[0]["w"])
  assert np.abs(np.mean(each, axis=0) - want).max() > 0.02 * np.abs(want).max()


def test_the_gradient_is_that_of_the_weighted_sum_of_means():
  def minimised(w):
    y_B = jnp.sin(BATCH["x"] @ w)
    used_B = BATCH["count"] > 0
    loss = jnp.sum(BATCH["count"] * y_B**2) / 35
    return loss + 0.3 * jnp.sum(used_B * jnp.cos(y_B)) / 8 + 0.01 * jnp.sum(w**2) / 3

  want = jax.grad(minimised)(jnp.arange(3.0))
  chex.assert_trees_all_close(gradients(Regression(), 3)[0]["w"], want, rtol=1e-5)


class WithTerm(Regression):
  """Regression whose objective has one more term, or none but it."""

  def __init__(self, term, alone=False):
    self.term, self.alone = term, alone

  def objective(self, params, model_state, batch, key):
    terms = {} if self.alone else super().objective(params, model_state, batch, key)
    return terms | self.term(params)


ONE = jnp.float32(1)
REFUSED = {
  "depends": (
    lambda p: {"norm": Weighted(ONE, jnp.sum(p["w"] ** 2))},
    "term 'norm': its denominator depends on the parameters",
  ),
  "depends, in a loop": (
    lambda p: {"norm": Weighted(ONE, jax.lax.fori_loop(0, 3, lambda _, x: x + p["w"][0], ONE))},
    "term 'norm': its denominator depends on the parameters",
  ),
  "array": (lambda p: {"w": Weighted(p["w"], ONE)}, r"term 'w': num \(3,\), den \(\) must be scal"),
  "no term": (lambda p: {"w": ONE}, "term 'w': must be a Weighted"),
  "traced weight": (lambda p: {"w": Weighted(ONE, ONE, ONE)}, "term 'w': weight=.* plain number"),
  "name": (lambda p: {"grad_norm": Weighted(ONE, ONE)}, "term 'grad_norm': this name belongs"),
  "unit": (lambda p: {"examples": Weighted(ONE, ONE)}, "term 'examples': this name belongs"),
}


@pytest.mark.parametrize("term, message", REFUSED.values(), ids=REFUSED)
def test_terms_that_cannot_be_accumulated_are_refused_at_trace_time(term, message):
  task = WithTerm(term)
  with pytest.raises(UserError, match=message):
    jax.eval_shape(make_train_step(CONFIG, task), init_state(CONFIG, task), BATCH)


def test_an_objective_without_a_loss_is_refused():
  task = WithTerm(lambda p: {"other": Weighted(ONE, ONE)}, alone=True)
  with pytest.raises(UserError, match="must return a dict with a term 'loss'"):
    jax.eval_shape(make_train_step(CONFIG, task), init_state(CONFIG, task), BATCH)


def test_denominators_that_follow_from_key_and_state_are_fine_and_printing_is_no_dependence():
  class Masked(Regression):
    def objective(self, params, model_state, batch, key):
      used_B = jax.random.bernoulli(key, 0.5, batch["count"].shape)
      jax.debug.print("{}", params["w"])
      den = jnp.sum(used_B, dtype=jnp.float32) + model_state["updates"]
      return {"loss": Weighted(jnp.sum(used_B * (batch["x"] @ params["w"])), den)}

  grads, terms = gradients(Masked(), 3)
  assert 0 < terms["loss"].den < 12 and np.isfinite(grads["w"]).all()


def test_the_objective_gets_a_key_of_its_own_for_every_step_and_micro_batch():
  class Ordered(Regression):
    """Which micro-batch drew what is seen from its first row's count."""

    def objective(self, params, model_state, batch, key):
      bits = jax.random.bits(key, (), jnp.uint32).astype(jnp.float32)
      where = jax.nn.one_hot((batch["count"][0] == jnp.array([8.0, 1, 0])).argmax(), 3)
      terms = super().objective(params, model_state, batch, key)
      return terms | {"bits": Weighted(where * bits, ONE / 3, 0.0)}

  config = dataclasses.replace(CONFIG, accumulate=3)
  step = jax.jit(make_train_step(config, Ordered()))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, Ordered())
  drawn = []
  for done in range(2):
    keys = [jax.random.fold_in(jax.random.fold_in(state.key, done), m) for m in range(3)]
    want = [float(jax.random.bits(key, (), jnp.uint32)) for key in keys]
    state, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["bits"], want, rtol=1e-6)
    drawn += want
  assert len(set(drawn)) == 6


@pytest.fixture(scope="module")
def stepped():
  """(state before, state after a step, state after a step that is left out, its metrics)."""
  step = jax.jit(make_train_step(CONFIG, Regression()))
  state = jax.jit(init_state, static_argnums=(0, 1))(CONFIG, Regression())
  state, _ = step(state, BATCH)
  return state, step(state, BATCH)[0], *step(state, BATCH, -1.0)


def test_frozen_weights_stay_and_model_state_follows_after_update(stepped):
  before, after, *_ = stepped
  chex.assert_trees_all_equal(after.frozen, {"table": jnp.eye(3)})
  assert int(after.model_state["updates"]) == 2
  assert float(after.model_state["largest"]) == pytest.approx(np.abs(BATCH["x"]).max())
  assert (after.params["w"] != before.params["w"]).all()
  chex.assert_trees_all_close(after.ema["w"], (before.ema["w"] + after.params["w"]) / 2)
  weights = after.weights()
  assert weights.keys() == {"w", "table"}
  chex.assert_trees_all_equal(weights["w"], after.ema["w"])


def test_a_step_left_out_changes_counters_alone(stepped):
  """The whole number in the model state is data and stays; the optimizer's count goes on."""
  before, _, skipped, metrics = stepped
  assert metrics["skipped"] == 1 and int(skipped.step) == int(before.step) + 1
  assert int(skipped.model_state["updates"]) == int(before.model_state["updates"]) == 1
  assert int(skipped.opt_state.count) == int(before.opt_state.count) + 1
  counted = before.opt_state._replace(count=before.opt_state.count + 1)
  want = before._replace(step=before.step + 1, opt_state=counted, key=None)
  chex.assert_trees_all_equal(skipped._replace(key=None), want)


def test_a_weight_that_is_both_trained_and_frozen_is_refused():
  class Twice(Regression):
    def init(self, key):
      return Start({"a": {"w": jnp.zeros(2)}}, {"a": {"w": jnp.zeros(2)}})

  with pytest.raises(UserError, match="frozen/a/w: is also trained"):
    init_state(CONFIG, Twice())


def test_the_backward_pass_is_in_the_program_once():
  """`sin` is differentiated to `cos`, which the forward pass has once itself."""

  def count(accumulate):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    state = init_state(config, Regression())
    program = str(jax.make_jaxpr(make_train_step(config, Regression()))(state, BATCH))
    return program.count("= cos "), program.count("= sin ")

  assert count(1) == count(4) == (2, 2)


def test_hyperparameters_are_arrays_that_one_program_serves():
  step = jax.jit(chex.assert_max_traces(make_train_step(CONFIG, Regression()), n=1))
  state = jax.jit(init_state, static_argnums=(0, 1))(CONFIG, Regression())
  moved = {}
  for rate in (0.1, 0.2):
    hyper = Hyper(jnp.float32(rate), jnp.float32(0), jnp.int32(10))
    after, metrics = step(state._replace(hyper=hyper), BATCH)
    assert metrics["learning_rate"] == pytest.approx(rate)
    moved[rate] = after.params["w"] - state.params["w"]
  chex.assert_trees_all_close(moved[0.2], 2 * moved[0.1], rtol=1e-5)


def test_noise_repeats_with_the_seed_and_differs_without():
  first = gradients(Noisy(), 3)[0]["w"]
  chex.assert_trees_all_equal(gradients(Noisy(), 3)[0]["w"], first)
  assert np.abs(gradients(Noisy(), 3, key=1)[0]["w"] - first).max() > 1e-3


def test_the_collector_pauses_while_a_step_is_traced_and_goes_on_after_it():
  enabled = []

  class Watching(Regression):
    def objective(self, params, model_state, batch, key):
      enabled.append(gc.isenabled())
      raise RuntimeError("in the objective")

  task = Watching()
  state = jax.eval_shape(lambda: init_state(CONFIG, task))
  with pytest.raises(RuntimeError, match="in the objective"):
    jax.eval_shape(make_train_step(CONFIG, task), state, BATCH)
  assert enabled == [False]
  assert gc.isenabled()
