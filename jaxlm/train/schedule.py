"""Computes the learning rate of a step, and what becomes of it when a run gets more steps."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxlm.config import OnNewSteps, OptimizerConfig, TrainConfig, check


def check_schedule(config: OptimizerConfig, steps: int) -> None:
  """Raises UserError where the warm-up leaves no step of those that the schedule spans."""
  span = config.schedule_steps or steps
  name = "optimizer.schedule_steps" if config.schedule_steps else "steps"
  check(config.warmup < span, "optimizer.warmup", config.warmup, f"must be below {name}={span}")


def learning_rate(
  config: OptimizerConfig, peak: jax.Array | float, steps: jax.Array | int, step: jax.Array | int
) -> jax.Array:
  """Returns the learning rate of a step (0-based), a float32 scalar.

  All arguments but `config` may be traced.

  Linear warm-up to `peak`, whose first step uses 1 / (warmup + 1) of it, then the named shape until
  step `schedule_steps`, or else `steps`; each cooldown multiplies what it begins with by a line
  from 1 to `final`. wsd is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395), its decay
  linear.
  """
  step = jnp.asarray(step, jnp.float32)
  begins, ends = config.cooldowns[::2], config.cooldowns[1::2]
  share = _share_of_peak(config, config.schedule_steps or steps, _until(step, *begins[:1]))
  for index, (begin, end) in enumerate(zip(begins, ends)):
    since = _until(step, *begins[index + 1 : index + 2]) - begin
    share *= 1 - (1 - config.final) * jnp.clip(since / (end - begin), 0, 1)
  return peak * share


def _until(step: jax.Array, *last: int) -> jax.Array:
  """Returns the step, or `last` where that is given and earlier."""
  return jnp.minimum(step, last[0]) if last else step


def _share_of_peak(config: OptimizerConfig, span: jax.Array | int, step: jax.Array) -> jax.Array:
  """Returns the share of the peak that warm-up and schedule leave at a step, without cooldowns."""
  span = jnp.asarray(span, jnp.float32)
  after = jnp.maximum(span - config.warmup, 1.0)
  since = step - config.warmup
  if config.schedule == "cosine":
    shape = (1 + jnp.cos(math.pi * jnp.clip(since / after, 0, 1))) / 2
  elif config.schedule == "linear":
    shape = 1 - jnp.clip(since / after, 0, 1)
  elif config.schedule == "wsd":
    cooling = jnp.minimum(jnp.maximum(1, jnp.round(config.decay * span)), after)
    shape = 1 - jnp.clip((since - (after - cooling)) / cooling, 0, 1)
  else:
    shape = jnp.float32(1)
  falling = config.final + (1 - config.final) * shape
  return jnp.where(since < 0, (step + 1) / (config.warmup + 1), falling)


def with_new_steps(
  config: TrainConfig, steps_before: int, step: int, how: OnNewSteps
) -> TrainConfig:
  """Returns the configuration of a run that goes on after `step` with `config.steps` steps.

  Its schedule so far was one of `steps_before` steps.
  """
  optimizer = config.optimizer
  if how == "extend":
    optimizer = dataclasses.replace(optimizer, schedule_steps=0, cooldowns=())
  else:
    span = optimizer.schedule_steps or steps_before
    optimizer = dataclasses.replace(optimizer, schedule_steps=span)
  if how == "decay":
    rule = f"the run is at step {step}, in its warm-up of {optimizer.warmup} steps; extend or keep"
    check(step >= optimizer.warmup, "schedule", how, rule)
    begun = sum(begin < step for begin in optimizer.cooldowns[::2])
    cooldowns = (*optimizer.cooldowns[: 2 * begun], step, config.steps)
    optimizer = dataclasses.replace(optimizer, cooldowns=cooldowns)
  return dataclasses.replace(config, optimizer=optimizer)


def describe_change(before: TrainConfig, config: TrainConfig, step: int) -> str:
  """Returns a line on the learning rate after `step` where a resume changes it or the steps."""
  rate_before, last_before = _rates(before, step)
  rate, last = _rates(config, step)
  if (rate_before, last_before, before.steps) == (rate, last, config.steps):
    return ""
  line = f"learning rate: {rate:.2e} at step {step + 1}"
  if not math.isclose(rate, rate_before, rel_tol=1e-6):
    line += f" instead of {rate_before:.2e}"
  line += f", {last:.2e} at step {config.steps}: {_describe(config)}"
  if before.steps != config.steps:
    line += f" (was: {_describe(before)}); --schedule extend, keep or decay chooses"
  return line


def _rates(config: TrainConfig, step: int) -> tuple[float, float]:
  """Returns the learning rates of the step after `step`, and of the last one."""
  optimizer = config.optimizer
  rate = jax.jit(lambda step: learning_rate(optimizer, optimizer.learning_rate, config.steps, step))
  return float(rate(step)), float(rate(max(step, config.steps - 1)))


def _describe(config: TrainConfig) -> str:
  optimizer = config.optimizer
  words = f"{optimizer.schedule} over {optimizer.schedule_steps or config.steps:,} steps"
  for begin, end in zip(optimizer.cooldowns[::2], optimizer.cooldowns[1::2]):
    words += f", falling from step {begin:,} to {end:,}"
  return words
