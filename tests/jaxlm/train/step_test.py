import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
  decoder,
  revise,
)
from jaxlm.data.packing import Batch
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from sharding import make_mesh
from sharding.batches import globalize

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)
STEPS = 4
# eps far above rounding errors: adam's first update is the sign of the gradient, whatever its size
BASE = TrainConfig(
  steps=20,
  batch=8,
  model=decoder(V=16, D=16, F=24, N=4, K=2, H=4, layers=2),
  compute=ComputeConfig(scan="always"),
  data=DataConfig(length=8),
  optimizer=OptimizerConfig(learning_rate=0.02, warmup=0, eps=1e-3, clip=0.0),
)


def with_optimizer(config: TrainConfig = BASE, **changes) -> TrainConfig:
  return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def make_batch(config: TrainConfig) -> Batch:
  draw = np.random.default_rng(0)
  ids_BT = draw.integers(0, config.model.V, (config.batch, config.data.length + 1)).astype(np.int32)
  return Batch(
    ids_BT[:, :-1], ids_BT[:, 1:], np.ones((config.batch, config.data.length), np.float32)
  )


class Run(NamedTuple):
  states: list[Any]  # as numpy, before the first step and after each
  metrics: list[Any]
  specs: tuple[
    dict, dict
  ]  # path -> PartitionSpec, of the matrices in parameters and in optimizer state


@functools.cache
def run(config: TrainConfig, mesh: MeshConfig = ONE) -> Run:
  with jax.set_mesh(make_mesh(mesh)):
    step = jax.jit(make_train_step(config, TextTask(config)))
    state, batch = (
      jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config)),
      globalize(make_batch(config), config.batch),
    )
    states, metrics = [jax.device_get(state._replace(key=None))], []
    for _ in range(STEPS):
      state, values = step(state, batch)
      states.append(jax.device_get(state._replace(key=None)))
      metrics.append(jax.device_get(values))
    specs = tuple(
      {
        jax.tree_util.keystr(path): x.sharding.spec
        for path, x in jax.tree.leaves_with_path(tree)
        if x.ndim >= 2
      }
      for tree in (state.params, state.opt_state)
    )
  return Run(states, metrics, specs)


def global_norm(tree) -> float:
  return float(
    np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
  )


WIDE = revise(BASE.model, D=128, F=128, N=4, K=4, H=32, layers=1)  # adafactor factors from 128 on
RULES = {
  "adamw": BASE,
  "muon": with_optimizer(name="muon"),
  "adafactor": with_optimizer(
    dataclasses.replace(BASE, model=WIDE), name="adafactor", learning_rate=3e-3
  ),
}


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name == "adamw" else pytest.mark.slow) for name in RULES]
)
def test_each_update_rule_lowers_the_loss_and_keeps_its_metrics(name):
  states, metrics, _ = run(RULES[name])
  losses = [m["loss"] for m in metrics]
  assert losses[-1] < losses[0] - 0.1, losses
  assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
  assert all(m["tokens"] == 64 and m["grad_norm"] > 0 for m in metrics)
  assert metrics[0]["learning_rate"] == pytest.approx(RULES[name].optimizer.learning_rate)
  assert all(
    np.abs(after - before).max() > 0
    for before, after in zip(*map(jax.tree.leaves, (states[0].params, states[1].params)))
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_each_update_rule_on_eight_devices_equals_one(name):
  want, got = run(RULES[name]), run(RULES[name], EIGHT)
  for a, b in zip(got.metrics, want.metrics):
    np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-5)

  last, want_last = got.states[-1].params, want.states[-1].params
  chex.assert_trees_all_close(last, want_last, rtol=0, atol=1e-5)
  if name != "adafactor":  # its factors have shapes of their own
    params, moments = got.specs
    assert sum(map(any, params.values())) == 9  # all but the norms
    for path, spec in params.items():  # moments lie like their parameter
      assert {other for name, other in moments.items() if name.endswith(path)} == {spec}, path


@pytest.mark.slow
def test_the_step_follows_its_schedule():
  config = with_optimizer(schedule="linear", warmup=2, final=0.1)
  rates = [m["learning_rate"] for m in run(config).metrics]
  assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02 - 0.018 / 18], rel=1e-5)


def test_clipping_scales_the_whole_gradient_and_reports_its_norm_before():
  """The first moment after one step is (1 - b1) times the clipped gradient."""
  plain, clipped = run(BASE), run(with_optimizer(clip=0.1))
  assert clipped.metrics[0]["grad_norm"] == pytest.approx(plain.metrics[0]["grad_norm"], rel=1e-6)
  assert plain.metrics[0]["grad_norm"] > 0.2
  first_moment = [r.states[1].opt_state.mu for r in (plain, clipped)]
  assert global_norm(first_moment[1]) / (1 - BASE.optimizer.b1) == pytest.approx(0.1, rel=1e-5)
  ratio = 0.1 / plain.metrics[0]["grad_norm"]
  scaled = jax.tree.map(lambda m: m * ratio, first_moment[0])
  chex.assert_trees_all_close(first_moment[1], scaled, rtol=1e-4, atol=1e-9)


def test_the_moving_average_starts_at_the_weights_and_follows_its_formula():
  states = run(dataclasses.replace(BASE, ema=0.75)).states
  average = states[0].params
  chex.assert_trees_all_equal(states[0].ema, states[0].params)
  for state in states[1:]:
    average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, state.params)
    chex.assert_trees_all_close(state.ema, average, atol=1e-6)
  # training ignores it
  chex.assert_trees_all_equal(states[-1].params, run(BASE).states[-1].params)


def test_without_a_moving_average_none_is_kept():
  assert run(BASE).states[-1].ema is None


def test_z_loss_enters_the_gradient_but_not_the_reported_loss():
  plain, penalised = run(BASE), run(dataclasses.replace(BASE, z_loss=1.0))
  assert penalised.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-6)
  assert penalised.metrics[0]["grad_norm"] > 1.05 * plain.metrics[0]["grad_norm"]


def test_another_seed_is_another_model():
  initialize = jax.jit(init_state, static_argnums=(0, 1))
  other = initialize(dataclasses.replace(BASE, seed=1), TextTask(BASE)).params["embed"]["weight"]
  first = run(BASE).states[0].params["embed"]["weight"]
  assert np.abs(first - other).max() > 0.1
