"""Loss on held-out text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from jaxlm.config import TrainConfig
from jaxlm.data.loader import Batch
from jaxlm.objectives import Weighted
from jaxlm.train.step import batch_loss
from sharding.batches import globalize


def make_evaluator(config: TrainConfig):
  """evaluate(params, batches) -> (mean cross-entropy in nats per token, tokens); compiled once, on first use."""
  one_batch = jax.jit(lambda params, batch: batch_loss(config, params, batch)[1])

  def evaluate(params: Any, batches: Iterable[Batch]) -> tuple[float, float]:
    total: Weighted | None = None
    for batch in batches:
      part = one_batch(params, globalize(batch, config.batch))
      total = part if total is None else total.plus(part)
    if total is None:
      raise ValueError("evaluate: no held-out batch")
    return float(total.mean()), float(total.den)

  return evaluate
