"""Cuts a language model into pipeline stages: embedding, layers, and head with the loss."""

# B batch, T positions, D model

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.data.packing import Batch
from jaxlm.data.ring import in_ring_order
from jaxlm.models import Transformer
from jaxlm.objectives import Weighted
from jaxlm.train.stages import Stacks, Stages
from sharding.context.order import Order, ring_size
from sharding.rules import own_part

Loss = Callable[[Any, jax.Array, Batch], dict[str, Weighted]]


def stages_of_text(model: Transformer, loss: Loss) -> Stages:
  """Returns the stages of a model; `loss` gives terms of (params, states [B, T, D], batch).

  What the tokens of a row see follows from the row's own positions and segments, in every stage.
  """
  # unrolled, because a scan over layers is one operation, which has no separate B and W
  model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, scan="never"))
  names = [str(index) for index in range(len(model.config.stacks))]

  def split(params: Any) -> tuple[Stacks, Any]:
    others = {name: value for name, value in params.items() if name != "stacks"}
    return tuple(params["stacks"][name] for name in names), others

  def join(stacks: Stacks, others: Any) -> Any:
    return others | {"stacks": dict(zip(names, stacks, strict=True))}

  def prepare(batch: Batch) -> Batch:
    ordered, _ = in_ring_order(batch)
    if batch.positions_BT is None:  # [1, T], for all rows: micro-batches cannot split it
      ordered = ordered._replace(positions_BT=None)
    return ordered

  def embed(others: Any, batch: Batch) -> jax.Array:
    return model.embed(others, _own_tokens(batch.inputs_BT))

  def layers(stacks: Stacks, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    order: Order = "zigzag" if ring_size() > 1 else "contiguous"
    T = batch.inputs_BT.shape[1]
    context = model.context(T, batch.positions_BT, batch.segment_ids_BT, True, order)
    for index, stack in enumerate(stacks):
      if jax.tree.leaves(stack)[0].shape[0]:
        x_BTD, _, _ = model.run_stack(index, stack, x_BTD, context)
    return x_BTD

  def objective(others: Any, x_BTD: jax.Array, batch: Batch) -> dict[str, Weighted]:
    targets_BT, weights_BT = _own_tokens(batch.targets_BT), _own_tokens(batch.weights_BT)
    own = batch._replace(targets_BT=targets_BT, weights_BT=weights_BT)
    return loss(others, model.finish(others, x_BTD, logits=False), own)

  return Stages(
    sizes=tuple((len(specs), repeats) for specs, repeats in model.config.stacks),
    split=split,
    join=join,
    prepare=prepare,
    embed=embed,
    layers=layers,
    objective=objective,
  )


def _own_tokens(x_BT: jax.Array) -> jax.Array:
  """Returns this device's tokens of rows that lie over several devices."""
  return own_part(x_BT, None, "length")
