"""Cuts a task's model into pipeline stages, and makes the schedule that a configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlm.config import TrainConfig, check
from jaxlm.objectives.weighted import Weighted
from pallas_kernels.common.errors import UserError
from sharding.pipeline import schedules
from sharding.pipeline.operations import Schedule

Stacks = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
  """Says how a task runs in stages: what comes before its layers, its layers, what comes after.

  The functions are traced inside `jax.shard_map` over all axes (see `sharding.rules`).
  """

  sizes: tuple[tuple[int, int], ...]
  """for each stack of layers (layers of one repeat, repeats); a stage has whole repeats"""
  split: Callable[[Any], tuple[Stacks, Any]]
  """params -> (stacks, whose arrays have a leading axis of repeats, all other parameters)"""
  join: Callable[[Stacks, Any], Any]
  """The inverse of `split`."""
  prepare: Callable[[Any], Any]
  """batch -> the batch that the functions below take; called before it is split, on the mesh"""
  embed: Callable[[Any, Any], jax.Array]
  """(other parameters, batch) -> the states before the first layer"""
  layers: Callable[[Stacks, jax.Array, Any], jax.Array]
  """(some repeats of each stack, x, batch) -> x"""
  objective: Callable[[Any, jax.Array, Any], dict[str, Weighted]]
  """(other parameters, the states after the last layer, batch) -> terms, as `Task.objective`"""


def make_schedule(config: TrainConfig, ranks: int) -> Schedule:
  """Returns the schedule that the configuration names, for so many ranks.

  Raises UserError where it cannot run that many micro-batches.
  """
  name, microbatches = config.pipeline.schedule, config.accumulate
  try:
    match name:
      case "interleaved":
        return schedules.interleaved(ranks, microbatches, config.pipeline.stages_per_rank)
      case "1f1b":
        return schedules.one_f_one_b(ranks, microbatches)
      case _:
        return getattr(schedules, name)(ranks, microbatches)
  except UserError as error:
    rule = f"with accumulate={microbatches} micro-batches on mesh.stage={ranks}: {error}"
    raise UserError(f"pipeline.schedule={name!r}: {rule}") from error


def cut_layers(
  sizes: Sequence[tuple[int, int]], stages: int, layers: Sequence[int] = ()
) -> list[tuple[int, ...]]:
  """Returns, for each stage, how many repeats of each stack it holds.

  `sizes` as in `Stages`, `layers` the number of layers of each stage. By default stages have equal
  numbers of repeats; where that does not come out, the middle ones, which have neither embedding
  nor head, have one more. Raises UserError where a border would divide a repeat.
  """
  repeats = [(stack, size) for stack, (size, count) in enumerate(sizes) for _ in range(count)]
  total = sum(size for _, size in repeats)
  if layers:
    rule = f"needs one number of layers for each of the {stages} stages"
    check(len(layers) == stages, "pipeline.layers_per_stage", layers, rule)
    rule = f"must add up to the model's {total} layers"
    check(sum(layers) == total and min(layers) >= 0, "pipeline.layers_per_stage", layers, rule)
  else:
    rule = f"the model has fewer repeats of layers, {len(repeats)}; see --pipeline.layers_per_stage"
    check(len(repeats) >= stages, "mesh.stage", stages, rule)
  base, more = divmod(len(repeats), stages)
  inner = sorted(range(stages), key=lambda stage: -min(stage, stages - 1 - stage))[:more]
  cuts, start = [], 0
  for stage in range(stages):
    stop = start + base + (stage in inner)
    if layers:
      stop = start
      while sum(size for _, size in repeats[start:stop]) < layers[stage]:
        stop += 1
      held = sum(size for _, size in repeats[start:stop])
      rule = f"stage {stage} would end inside of a repeat of layers, after {held} it can"
      check(held == layers[stage], "pipeline.layers_per_stage", layers, rule)
    own = [stack for stack, _ in repeats[start:stop]]
    cuts.append(tuple(own.count(stack) for stack in range(len(sizes))))
    start = stop
  return cuts
