"""Measures what a model loses without its super weights, and when the rest is rounded to int4."""

# B batch, T positions

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.formats import UniformFormat
from jaxlm.data.packing import Batch
from jaxlm.models.parts import list_matmuls
from jaxlm.quant.super_weight import (
  SuperWeight,
  find_super_weights,
  quantize_around,
  scale_weights,
)
from jaxlm.run.text import TextTask
from jaxlm.train.evaluate import make_evaluator

Params = dict[str, Any]
PRUNED = (10, 100, 1000)
"""how many of the next largest weights are zeroed"""
FACTORS = (0.01, 0.1, 0.5, 1.5, 2.0)
CLIPS = (9.0, 11.0, 12.0, 20.0)
"""z of the published scripts"""
FORMAT = UniformFormat(bits=4, grid="affine", shared="tensor")


class Measurements:
  """Measures models of one configuration on the text of a task, each program compiled once."""

  def __init__(self, task: TextTask):
    self.task = task
    self._read_rows = make_evaluator(task.objective)

  def of(
    self, params: Params, ids_BT: jax.Array, batches: list[Batch], rows: Any
  ) -> dict[str, float]:
    """Returns how many super weights there are, the place of the first, its spikes, and losses.

    They are searched on the rows `ids_BT`. Losses on held-out text: "whole", "pruned" (all of them
    zero), "largest N pruned" (others), "scaled S", and in int4 "rounded", "clipped" and "restored",
    with the z that is best for "restored" on the batches. Without super weights there are only
    "whole" and "rounded".
    """
    model = self.task.config.model

    def loss(params: Params) -> float:
      return self.task.evaluate(params, {}, rows)["heldout_loss"]

    weights = find_super_weights(model, params, ids_BT)
    rounded = quantize_around(model, params, [], FORMAT, z=np.inf)
    numbers = {"found": len(weights), "whole loss": loss(params), "rounded loss": loss(rounded)}
    if not weights:
      return numbers
    first = weights[0]
    numbers |= {
      "layer": int(first.name.split(".")[1]),
      "row": first.row,
      "column": first.column,
      "value": first.value,
      "input spike": first.input_spike,
      "output spike": first.output_spike,
      "pruned loss": loss(scale_weights(model, params, weights, 0.0)),
    }
    for count in PRUNED:
      numbers[f"largest {count} pruned loss"] = loss(prune_largest(model, params, weights, count))
    for factor in FACTORS:
      numbers[f"scaled {factor:g} loss"] = loss(scale_weights(model, params, weights, factor))

    def restored(z: float) -> Params:
      return quantize_around(model, params, weights, FORMAT, z=z)

    losses = [float(self._read_rows(restored(z), {}, batches)["loss"].mean()) for z in CLIPS]
    z = CLIPS[int(np.argmin(losses))]
    clipped = quantize_around(model, params, [], FORMAT, z=z)
    return numbers | {"z": z, "clipped loss": loss(clipped), "restored loss": loss(restored(z))}


def prune_largest(
  model: ModelConfig, params: Params, weights: list[SuperWeight], count: int
) -> Params:
  """Returns the parameters without the largest weights of all layers, super weights aside."""
  kept = scale_weights(model, params, weights, 0.0)  # so that they do not count
  paths = [matmul.path for matmul in list_matmuls(model) if matmul.path[0] == "stacks"]
  sizes = jnp.concatenate([jnp.abs(_at(kept, path)["weight"]).ravel() for path in paths])
  least = jax.lax.top_k(sizes, count)[0][-1]
  pruned = jax.tree.map(lambda w: w, params)
  for path in paths:
    part = _at(pruned, path)
    is_large = jnp.abs(_at(kept, path)["weight"]) >= least
    part["weight"] = jnp.where(is_large, 0.0, part["weight"])
  return pruned


def _at(params: Params, path: tuple[str, ...]) -> Params:
  for name in path:
    params = params[name]
  return params
