"""Sums the terms of an objective over a whole set of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxlm.objectives.weighted import Weighted
from pallas_kernels.common.errors import UserError


def make_evaluator(
  objective: Callable[..., dict[str, Weighted]],
) -> Callable[..., dict[str, Weighted]]:
  """Returns evaluate(params, model_state, batches) -> terms summed over all batches.

  `objective` is that of a `Task`. Batches are global arrays of one shape, for which it is compiled
  once, on first use; batch i gets fold_in(key(0), i), so that an evaluation repeats.
  """
  one_batch = jax.jit(objective)

  def evaluate(params: Any, model_state: Any, batches: Iterable[Any]) -> dict[str, Weighted]:
    total: dict[str, Weighted] | None = None
    for index, batch in enumerate(batches):
      part = one_batch(params, model_state, batch, jax.random.fold_in(jax.random.key(0), index))
      total = part if total is None else {name: total[name].plus(part[name]) for name in part}
    if total is None:
      raise UserError("evaluate: there is no held-out batch")
    return total

  return evaluate
