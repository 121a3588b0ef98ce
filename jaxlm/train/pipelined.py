"""Computes the gradients of a batch on a mesh whose `stage` axis splits the layers."""

# M micro-batches, B batch

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import TrainConfig
from jaxlm.objectives.weighted import Weighted
from jaxlm.train.accumulate import Objective, Terms, denominators, split_batch
from jaxlm.train.stages import Stages, cut_layers, make_schedule
from sharding.pipeline import Pipeline, pipelined_value_and_grad
from sharding.rules import mesh_shape


def pipelined_gradients(
  config: TrainConfig,
  stages: Stages,
  objective: Objective,
  params: Any,
  batch: Any,
  key: jax.Array,
) -> tuple[Any, Terms]:
  """Returns what `accumulated_gradients` does, by the schedule that the configuration names.

  Micro-batches are the same, of the same rows, and so are the denominators of their terms.
  `objective` serves to find these; what runs is `stages`.
  """
  M = config.accumulate
  schedule = make_schedule(config, mesh_shape()["stage"])
  parts = jax.tree.map(lambda x: split_batch(x, M), batch)
  keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(M))
  dens = denominators(objective, params, parts, keys)
  parts = jax.tree.map(lambda x: split_batch(x, M), stages.prepare(batch))
  dens_M = {name: jnp.broadcast_to(den, (M,)) for name, den in dens.items()}
  weights: dict[str, float] = {}

  def loss(shared: Any, x: jax.Array, part: Any) -> tuple[jax.Array, Any]:
    rows, dens = part
    terms = stages.objective(shared, x, rows)
    weights.update({name: term.weight for name, term in terms.items()})
    shares = [
      term.weight * Weighted(term.num, dens[name]).mean()
      for name, term in terms.items()
      if term.weight
    ]
    return sum(shares, start=jnp.float32(0)), {name: term.num for name, term in terms.items()}

  pipeline = Pipeline(
    embed=lambda shared, part: stages.embed(shared, part[0]),
    layers=lambda stacks, x, part: stages.layers(stacks, x, part[0]),
    loss=loss,
  )
  cuts = cut_layers(stages.sizes, schedule.stages, config.pipeline.layers_per_stage)
  run = pipelined_value_and_grad(pipeline, schedule, cuts)
  (_, nums), grads = run(*stages.split(params), (parts, dens_M))
  terms = {name: Weighted(num, dens[name], weights[name]) for name, num in nums.items()}
  return stages.join(*grads), terms
