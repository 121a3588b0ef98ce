"""A run compiles its step once and its evaluation once, and so does its resume."""

import collections
import contextlib
import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxlm import presets
from jaxlm.config import DataConfig, MeshConfig, OptimizerConfig
from jaxlm.data.packing import Batch
from jaxlm.run import resume, train
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted_compilations():
  """Counts the compilations of every jitted function by its name, cached on disk or not."""
  counts = collections.Counter()

  def listen(event: str, seconds: float, fun_name: str = "", **_) -> None:
    if event == COMPILED:
      counts[fun_name.removeprefix("jit_").removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
  """Six steps of packed rows in micro-batches, with two evaluations of several batches."""
  return dataclasses.replace(
    presets.micro(),
    run=str(tmp_path_factory.mktemp("compiles") / "run"),
    steps=6,
    save_every=2,
    eval_every=3,
    eval_batches=3,
    batch=8,
    accumulate=2,
    mesh=MeshConfig(data=2),
    data=DataConfig(source=str(corpus), length=8, layout="packed", holdout=0.2),
    optimizer=OptimizerConfig(warmup=1),
  )


@pytest.mark.slow
def test_a_run_and_its_resume_compile_step_and_evaluation_once_each(config):
  with counted_compilations() as first:
    train(config)
  with counted_compilations() as again:
    resume(config.run, steps=9)
  for counts in (first, again):
    assert counts["train_step"] == 1
    assert counts["losses"] == 1  # the evaluation


def test_other_numbers_in_state_batch_and_limit_do_not_trace_the_step_again():
  config = dataclasses.replace(presets.micro(), batch=2, data=DataConfig(length=8))
  task = TextTask(config)
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(make_train_step(config, task), n=1))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, task)
  for seed in range(3):
    ids_BX = np.random.default_rng(seed).integers(0, 256, (2, 9), np.int32)
    batch = Batch(ids_BX[:, :-1], ids_BX[:, 1:], np.ones((2, 8), np.float32))
    state, _ = step(state, batch, 10.0 + seed)
    state = state._replace(hyper=jax.tree.map(lambda x: 2 * x, state.hyper))
