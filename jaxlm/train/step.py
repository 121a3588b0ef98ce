"""Makes one optimizer step: a pure function of (state, batch)."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import TrainConfig
from jaxlm.objectives.weighted import Weighted
from jaxlm.train.accumulate import accumulated_gradients
from jaxlm.train.optimizer import make_optimizer, update
from jaxlm.train.pipelined import pipelined_gradients
from jaxlm.train.schedule import check_schedule, learning_rate
from jaxlm.train.stages import Stages
from jaxlm.train.state import TrainState, merge
from jaxlm.train.task import Task
from pallas_kernels.common.errors import UnsupportedError, UserError
from sharding.rules import defer_reduction, mesh_shape

Metrics = dict[str, jax.Array]
_OWN_METRICS = ("grad_norm", "learning_rate", "skipped")


def make_train_step(config: TrainConfig, task: Task) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns train_step(state, batch, limit=inf) -> (state, metrics), not yet jitted.

  metrics: the mean of each term of the objective, the denominator of "loss" under the name
  `task.unit`, `grad_norm` before clipping, `learning_rate`, and `skipped`: 1 where the update was
  left out because loss or gradient are not finite or the loss is above `limit`. Besides, arrays of
  `task.probe`. What is left out leaves parameters, model state, average and moments as they were;
  counters count on.
  """
  check_schedule(config.optimizer, config.steps)

  @_without_collector()
  def train_step(
    state: TrainState, batch: Any, limit: float = math.inf
  ) -> tuple[TrainState, Metrics]:
    roles = task.roles(state.params)
    frozen = defer_reduction(state.frozen)

    def objective(params: Any, batch: Any, key: jax.Array) -> dict[str, Weighted]:
      return task.objective(merge(params, frozen), state.model_state, batch, key)

    key = jax.random.fold_in(state.key, state.step)
    if mesh_shape().get("stage", 1) > 1:
      stages = _stages(task, state)
      grads, terms = pipelined_gradients(config, stages, objective, state.params, batch, key)
    else:
      grads, terms = accumulated_gradients(objective, state.params, batch, key, config.accumulate)
    _check_names(terms, task)
    probes = task.probe(state.params, grads)
    grad_norm = optax.tree.norm(grads)
    if config.optimizer.clip:
      scale = config.optimizer.clip / jnp.maximum(grad_norm, config.optimizer.clip)
      grads = jax.tree.map(lambda g: scale * g, grads)

    hyper = state.hyper
    rate = learning_rate(config.optimizer, hyper.learning_rate, hyper.steps, state.step)
    optimizer = make_optimizer(config.optimizer, roles)
    params, opt_state = update(
      optimizer, roles, grads, state.opt_state, state.params, rate, hyper.weight_decay
    )
    means = {name: term.mean() for name, term in terms.items()}
    params, model_state = task.after_update(params, state.model_state, means)
    ema = state.ema
    if config.ema:
      ema = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, ema, params)

    loss = means["loss"]
    taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)
    new = state._replace(params=params, model_state=model_state, opt_state=opt_state, ema=ema)
    new = jax.tree_util.tree_map_with_path(functools.partial(_choose, taken), new, state)
    skipped = 1 - taken.astype(jnp.float32)
    metrics = means | {task.unit: terms["loss"].den, "grad_norm": grad_norm}
    metrics |= {"learning_rate": rate, "skipped": skipped} | probes
    return new._replace(step=state.step + 1), metrics

  return train_step


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
  """Pauses the search for cycles among Python's objects, which hardly any that tracing makes have.

  A full search takes 0.1 s, a sixth of tracing a small model, and goes over all that is imported.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


def _stages(task: Task, state: TrainState) -> Stages:
  """Returns the stages of a task, or raises UserError where it cannot be trained in stages."""
  stages = task.stages()
  ranks, name = mesh_shape()["stage"], type(task).__name__
  if stages is None:
    raise UserError(f"mesh.stage={ranks}: {name} has no stages; it must be 1")
  if jax.tree.leaves(state.frozen):
    raise UnsupportedError(f"mesh.stage={ranks}: {name} has frozen weights, which no stage holds")
  return stages


def _choose(taken: jax.Array, path: tuple, new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `new` if the update is taken, else `old`; a counter is always `new`.

  Counters are the whole numbers in the optimizer state that optax calls `count`. They are schedules
  of the step, so they go on; every other whole number is data and stays as it was.
  """
  is_counter = path[0].name == "opt_state" and getattr(path[-1], "name", "") == "count"
  return new if is_counter else jax.lax.select(taken, new, old)


def _check_names(terms: dict[str, Weighted], task: Task) -> None:
  """Raises UserError where a term has the name of a metric that every step has."""
  for name in (task.unit, *_OWN_METRICS):
    if name in terms:
      raise UserError(f"term {name!r}: this name belongs to a metric of the step itself")
