"""One optimizer step as a pure function of (state, batch)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import TrainConfig
from jaxlm.data.loader import Batch
from jaxlm.models import Transformer
from jaxlm.objectives import Weighted, next_token_loss
from jaxlm.train.accumulate import accumulated_gradients
from jaxlm.train.optimizer import learning_rate_schedule, make_optimizer, update


class TrainState(NamedTuple):
  """All that a run carries from step to step, but for the data position."""

  step: jax.Array  # int32, steps done
  params: Any
  opt_state: Any
  ema: Any  # moving average of params, or None
  key: jax.Array  # of the run; a step's randomness is fold_in(key, step)


class Metrics(NamedTuple):
  """Of one step, float32 scalars: loss in nats per token, predicted tokens, gradient norm before clipping."""

  loss: jax.Array
  tokens: jax.Array
  grad_norm: jax.Array
  learning_rate: jax.Array
  skipped: jax.Array  # 1 where the update was left out


def init_state(config: TrainConfig, params: Any = None) -> TrainState:
  """The state before the first step, of these parameters or fresh ones, which under `jax.jit` are born sharded."""
  key = jax.random.key(config.seed)
  if params is None:
    params = Transformer(config.model, config.compute).init(jax.random.fold_in(key, 0))
  opt_state = make_optimizer(config.optimizer, config.steps).init(params)
  return TrainState(
    jnp.int32(0), params, opt_state, params if config.ema else None, jax.random.fold_in(key, 1)
  )


def batch_loss(config: TrainConfig, params: Any, batch: Batch) -> tuple[Weighted, Weighted]:
  """(what to minimise, plain cross-entropy) of one batch."""
  model = Transformer(config.model, config.compute)
  states_BTD = model.apply(
    params,
    batch.inputs_BT,
    positions=batch.positions_BT,
    segment_ids=batch.segment_ids_BT,
    logits=False,
  )
  return next_token_loss(
    states_BTD,
    model.head(params),
    batch.targets_BT,
    batch.weights_BT,
    config.z_loss,
    config.loss_implementation,
  )


def make_train_step(config: TrainConfig) -> Callable[..., tuple[TrainState, Metrics]]:
  """train_step(state, batch, limit=inf) of this configuration, not yet jitted.

  An update whose loss or gradient is not finite, or whose loss is above `limit`, is left out: the weights stay.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  rate = learning_rate_schedule(config.optimizer, config.steps)

  def train_step(
    state: TrainState, batch: Batch, limit: float = math.inf
  ) -> tuple[TrainState, Metrics]:
    def objective(params: Any, batch: Batch) -> tuple[Weighted, Weighted]:
      return batch_loss(config, params, batch)

    grads, loss = accumulated_gradients(objective, state.params, batch, config.accumulate)
    grad_norm = optax.tree.norm(grads)
    if config.optimizer.clip:
      scale = config.optimizer.clip / jnp.maximum(grad_norm, config.optimizer.clip)
      grads = jax.tree.map(lambda g: g * scale, grads)
    params, opt_state = update(optimizer, grads, state.opt_state, state.params)
    ema = state.ema
    if config.ema:
      ema = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, ema, params)
    taken = jnp.isfinite(loss.mean()) & jnp.isfinite(grad_norm) & (loss.mean() <= limit)
    before = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(
      functools.partial(_choose, taken), (params, opt_state, ema), before
    )
    metrics = Metrics(
      loss.mean(), loss.den, grad_norm, rate(state.step), 1 - taken.astype(jnp.float32)
    )
    return TrainState(state.step + 1, params, opt_state, ema, state.key), metrics

  return train_step


def _choose(taken: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """`new` if taken, else `old`; counters always count, so that the learning rate stays a function of the step."""
  return new if jnp.issubdtype(new.dtype, jnp.integer) else jax.lax.select(taken, new, old)
