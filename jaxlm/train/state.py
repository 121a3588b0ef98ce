"""Holds what a run carries from step to step, besides its position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import TrainConfig
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.task import Start, Task
from pallas_kernels.common.errors import UserError


class Hyper(NamedTuple):
  """Holds the hyperparameters that a sweep varies, as arrays, so that one program serves all."""

  learning_rate: jax.Array  # float32, peak of the schedule
  weight_decay: jax.Array  # float32
  steps: jax.Array  # int32, length of the schedule

  @classmethod
  def of(cls, config: TrainConfig) -> Hyper:
    """Returns the values that a configuration asks for."""
    return cls(
      jnp.float32(config.optimizer.learning_rate),
      jnp.float32(config.optimizer.weight_decay),
      jnp.int32(config.steps),
    )


class TrainState(NamedTuple):
  """Holds all that a run carries from step to step; each field is an item of a checkpoint."""

  step: jax.Array  # int32, steps done
  params: Any  # what is trained
  frozen: Any  # weights that are not
  model_state: Any  # what `Task.after_update` changes
  opt_state: Any
  ema: Any  # moving average of params, or None
  key: jax.Array  # a step's randomness is fold_in(key, step), a micro-batch's fold_in of that
  hyper: Hyper

  def weights(self) -> Any:
    """Returns the weights for use: the moving average if there is one, with the frozen ones."""
    return merge(self.params if self.ema is None else self.ema, self.frozen)


def init_state(
  config: TrainConfig, task: Task, start: Start | None = None, seed: Any = None
) -> TrainState:
  """Returns the state before the first step, from `start` or the task's own `init`.

  Under `jax.jit` arrays are born sharded. `seed`, by default the configuration's, may be traced.
  """
  key = jax.random.key(config.seed if seed is None else seed)
  params, frozen, model_state = start or task.init(jax.random.fold_in(key, 0))
  merge(params, frozen)  # refuses a weight that is in both
  return TrainState(
    step=jnp.int32(0),
    params=params,
    frozen=frozen,
    model_state=model_state,
    opt_state=make_optimizer(config.optimizer, task.roles(params)).init(params),
    ema=params if config.ema else None,
    key=jax.random.fold_in(key, 1),
    hyper=Hyper.of(config),
  )


def merge(params: Any, frozen: Any, path: str = "") -> Any:
  """Returns one tree with the leaves of both; UserError names a leaf that is in both."""
  if not jax.tree.leaves(frozen):
    return params
  if not (isinstance(params, Mapping) and isinstance(frozen, Mapping)):
    raise UserError(
      f"frozen{path}: is also trained, or not in a nested dict; a weight has one home"
    )
  both = {
    name: merge(params[name], frozen[name], f"{path}/{name}") for name in params if name in frozen
  }
  return {**params, **frozen, **both}
