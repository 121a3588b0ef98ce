"""Makes row statistics one differentiable operation, whatever backend computes them."""

# N tokens
from __future__ import annotations

import functools
from types import ModuleType

import jax

from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options, Statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def statistics(inputs: Inputs, options: Options, backend: ModuleType) -> Statistics:
  """Returns row statistics over the whole vocabulary by `backend.statistics` and `.gradients`.

  Between the passes 8 bytes a token are kept; the backward pass computes the logits again.
  """
  return _forward(inputs, options, backend)[0]


def _forward(
  inputs: Inputs, options: Options, backend: ModuleType
) -> tuple[Statistics, tuple[Inputs, Statistics]]:
  stats = terms.combine_shards(backend.statistics(inputs, options), options)
  return stats, (inputs, stats)


def _backward(
  options: Options,
  backend: ModuleType,
  saved: tuple[Inputs, Statistics],
  cotangents: Statistics,
) -> tuple[Inputs]:
  inputs, stats = saved
  return (terms.pull_back_statistics(backend.gradients, inputs, stats, cotangents, options),)


statistics.defvjp(_forward, _backward)
