"""Lists what a training step sends between devices, as `sharding.rules` spreads its arrays.

Volumes are those of `sharding.roofline` and of the layout of jaxlm: weights are gathered in each
layer, norms and the residual stream split the sequence over `tensor`, the embedding's rows are
exchanged rather than its table.
"""

# rows of a micro-batch on one device, T positions, D model, V vocabulary, t devices of `tensor`

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sharding.plan.shapes import LayerShapes, ModelShapes, Step, split_layers
from sharding.roofline import pipeline_ticks

Sizes = Mapping[str, int]
WEIGHT_AXES = ("fsdp", "context_ring", "context_ulysses", "expert")


class Traffic(NamedTuple):
  """Describes one array that a collective sends, as `sharding.collectives.Collective` does."""

  kind: str
  axes: tuple[str, ...]
  bytes: float
  """on one device: of a gather the result, of a reduce-scatter the operand"""
  times: float
  """in a step"""
  purpose: str


def crossed(sizes: Sizes, *axes: str) -> tuple[str, ...]:
  """Returns those of these mesh axes that split something, in mesh order."""
  return tuple(axis for axis in sizes if axis in axes and sizes[axis] > 1)


def gathered_axes(sizes: Sizes) -> tuple[str, ...]:
  """Returns the mesh axes over which each micro-batch gathers weights: in a pipeline not `fsdp`."""
  return crossed(sizes, *WEIGHT_AXES[sizes["stage"] > 1 :])


def parts(sizes: Sizes, *axes: str) -> int:
  """Returns the number of parts into which these mesh axes split an array."""
  return math.prod(sizes[axis] for axis in axes)


def local_rows(step: Step, sizes: Sizes) -> float:
  """Returns the rows of a micro-batch that a device computes."""
  return step.batch / step.accumulate / parts(sizes, "data", "fsdp", "expert")


def local_tokens(step: Step, sizes: Sizes) -> float:
  """Returns the tokens of a micro-batch that a device computes, where `tensor` does not split."""
  return local_rows(step, sizes) * step.length / parts(sizes, "context_ring", "context_ulysses")


def step_traffic(model: ModelShapes, step: Step, sizes: Sizes) -> list[Traffic]:
  """Returns the arrays that a device sends in a step, on the fullest pipeline stage.

  In a pipeline a device gathers the weights of its stages once for all micro-batches, and every
  stage has the embedding and the head, whose gradients are summed over stages.
  """
  traffic: list[Traffic] = []
  for layer, count in split_layers(model, sizes["stage"]):
    for item in _layer_traffic(layer, model.D, step, sizes):
      traffic.append(item._replace(times=item.times * count * step.accumulate))
  for item in (*_embedding_traffic(model, step, sizes), *_head_traffic(model, step, sizes)):
    traffic.append(item._replace(times=item.times * step.accumulate))
  traffic += _gradient_traffic(model, sizes)
  if sizes["stage"] > 1:
    traffic += _stage_traffic(model, step, sizes)
  return [item for item in traffic if item.times]


def _stage_traffic(model: ModelShapes, step: Step, sizes: Sizes) -> Iterator[Traffic]:
  """Yields what a pipeline sends: messages in both directions in every tick, and weights once."""
  stages, e = crossed(sizes, "stage"), step.compute_bytes
  boundary = local_tokens(step, sizes) * model.D * e / sizes["tensor"]
  ticks = pipeline_ticks(step.schedule, sizes["stage"], step.accumulate, chunks=step.chunks)
  yield Traffic("collective-permute", stages, boundary, 2 * ticks, "stage boundary")
  ends = (1 if model.tied else 2) * model.V * model.D / sizes["tensor"]
  shared = ends / parts(sizes, *WEIGHT_AXES)
  yield Traffic("all-reduce", stages, 4 * shared, 1, "gradients of embedding and head")
  if weight_axes := crossed(sizes, "fsdp"):
    held = local_weights(model, sizes)[0] * sizes["fsdp"]
    yield Traffic("all-gather", weight_axes, held * e, 1, "weights")
    yield Traffic("reduce-scatter", weight_axes, held * step.reduce_bytes, 1, "weight gradients")


def _layer_traffic(layer: LayerShapes, D: int, step: Step, sizes: Sizes) -> Iterator[Traffic]:
  """Yields what one micro-batch sends in one layer, forward and backward."""
  e, t, again = step.compute_bytes, sizes["tensor"], step.remat != "none"
  tokens = local_tokens(step, sizes)
  weight_axes = gathered_axes(sizes)
  dense = (layer.attention_weights + layer.mlp_weights) / t
  if weight_axes:
    yield Traffic("all-gather", weight_axes, dense * e, 1 + again, "weights")
    yield Traffic("reduce-scatter", weight_axes, dense * step.reduce_bytes, 1, "weight gradients")
  expert_axes = tuple(axis for axis in weight_axes if axis != "expert")
  held = layer.E / sizes["expert"] * layer.expert_weights / t
  if layer.E and expert_axes:
    yield Traffic("all-gather", expert_axes, held * e, 1 + again, "expert weights")
    yield Traffic("reduce-scatter", expert_axes, held * step.reduce_bytes, 1, "expert gradients")
  if tensor := crossed(sizes, "tensor"):
    hidden = tokens * D * e
    yield Traffic("all-gather", tensor, hidden, 4 + 2 * again, "activations")
    # the sum after attention is made again unless its result is kept
    scatters = 4 + (step.remat == "full")
    yield Traffic("reduce-scatter", tensor, hidden, scatters, "activations")
  if layer.E and (experts := crossed(sizes, "expert")):
    slots = tokens / t * layer.active * D * e
    yield Traffic("all-to-all", experts, slots, 4 + again, "tokens to experts and back")
  yield from _context_traffic(layer, step, sizes)


def _context_traffic(layer: LayerShapes, step: Step, sizes: Sizes) -> Iterator[Traffic]:
  """Yields what attention sends where the sequence is split, of Ulysses and of a ring."""
  e, t, again = step.compute_bytes, sizes["tensor"], step.remat == "full"
  ring, ulysses = sizes["context_ring"], sizes["context_ulysses"]
  tokens = local_tokens(step, sizes)
  N, K, width = layer.N / t, layer.K / t, layer.H + layer.U
  if ulysses > 1:
    repeated = max(K, ulysses)
    exchanged = tokens * (N + repeated) * width * e
    axes = crossed(sizes, "context_ulysses")
    yield Traffic("all-to-all", axes, exchanged, 2 + again, "heads")
    K = repeated
  if ring > 1:
    block = tokens * K * width  # keys and values
    axes, hops = crossed(sizes, "context_ring"), ring - 1
    # forward, backward, and once more before that, but for a first hop that both can use
    passes = 2 * hops + again * (hops - 1)
    yield Traffic("collective-permute", axes, block * e, passes, "keys and values")
    yield Traffic("collective-permute", axes, block * 4, hops, "their gradients")
    yield Traffic("collective-permute", axes, block * e, 1, "their gradients, home")


def _embedding_traffic(model: ModelShapes, step: Step, sizes: Sizes) -> Iterator[Traffic]:
  tokens, t = local_tokens(step, sizes), sizes["tensor"]
  rows = tokens * model.D * step.compute_bytes
  width_axes = gathered_axes(sizes)
  if tensor := crossed(sizes, "tensor"):
    yield Traffic("reduce-scatter", tensor, rows, 1, "embedding")
    yield Traffic("all-gather", tensor, rows, 1, "embedding")
  if width_axes:
    ids = 4 * tokens * parts(sizes, *width_axes)
    yield Traffic("all-gather", width_axes, ids, 1, "token ids")
    narrow = min(step.compute_bytes, step.reduce_bytes) / step.compute_bytes
    yield Traffic("all-to-all", width_axes, rows / t, 1, "embedding")
    yield Traffic("all-to-all", width_axes, rows / t * narrow, 1, "embedding")


def _head_traffic(model: ModelShapes, step: Step, sizes: Sizes) -> Iterator[Traffic]:
  tokens, weights = local_tokens(step, sizes), model.V * model.D / sizes["tensor"]
  if weight_axes := gathered_axes(sizes):
    yield Traffic("all-gather", weight_axes, weights * step.compute_bytes, 1, "head")
    yield Traffic("reduce-scatter", weight_axes, weights * step.reduce_bytes, 1, "head")
  if tensor := crossed(sizes, "tensor"):
    states = tokens * model.D * step.compute_bytes
    yield Traffic("all-gather", tensor, states, 1, "states before the head")
    yield Traffic("reduce-scatter", tensor, states, 1, "states before the head")
    yield Traffic("all-reduce", tensor, 4 * tokens, 3, "softmax of the loss")


def _gradient_traffic(model: ModelShapes, sizes: Sizes) -> Iterator[Traffic]:
  """Yields what crosses once a step: gradients over `data`, those of norms over all axes."""
  matrices, vectors = local_weights(model, sizes)
  if data := crossed(sizes, "data"):
    yield Traffic("all-reduce", data, 4 * matrices, 1, "gradients")
  everywhere = tuple(axis for axis in sizes if sizes[axis] > 1 and axis != "stage")
  if everywhere:
    yield Traffic("all-reduce", everywhere, 4 * vectors, 1, "gradients of norms")


def local_weights(model: ModelShapes, sizes: Sizes) -> tuple[float, float]:
  """Returns how many matrix entries, and how many entries of vectors, one device holds."""
  t, split = sizes["tensor"], parts(sizes, *WEIGHT_AXES)
  matrices = (1 if model.tied else 2) * model.V * model.D / t / split
  vectors: float = model.D
  for layer, count in split_layers(model, sizes["stage"]):
    dense = layer.attention_weights + layer.mlp_weights
    matrices += count * (dense + layer.E * layer.expert_weights) / t / split
    vectors += count * layer.vectors
  return matrices, vectors
