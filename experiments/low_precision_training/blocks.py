"""Measures where one scale for a square of gradients is too coarse: for tokens of unequal size."""

# Z tokens, D, F input and output width of a matmul, B batch, T positions

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.config.formats import BlockFormat, Format, Fp8Format
from jaxlm.data.loader import Batch, TextData, heldout_batches
from jaxlm.objectives import next_token_loss
from jaxlm.quant.apply import quantize
from jaxlm.run.text import TextTask

FORMATS: dict[str, tuple[Format, Format]] = {
  "fp8": (Fp8Format(), Fp8Format(shared="block")),
  "mxfp4": (BlockFormat(), BlockFormat(shared="block")),
  "nvfp4": (BlockFormat(elements="nvfp4"), BlockFormat(elements="nvfp4", shared="block")),
}
"""tiles along the contracted axis, and squares"""
IMBALANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
TOO_MUCH = 2.0
"""squares fail where a token's error is so many times that of tiles"""


def token_error(format: str, imbalance: float) -> dict[str, float]:
  """Returns the relative error of dx = dy w^T at the median token, with tiles and with squares.

  Gradients are normal, times a log-normal size for each of 4096 tokens whose logarithm has
  `imbalance` for its standard deviation; the weight is not rounded.
  """
  tiles, squares = map(float, _median_errors(format, imbalance))
  return {"tiles": round(tiles, 6), "squares": round(squares, 6)}


@functools.partial(jax.jit, static_argnums=0)
def _median_errors(name: str, imbalance: jax.Array) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  size_Z1 = jnp.exp(imbalance * jax.random.normal(keys[0], (4096, 1)))
  dy_ZF = size_Z1 * jax.random.normal(keys[1], (4096, 128))
  w_DF = jax.random.normal(keys[2], (64, 128))
  dx_ZD = dy_ZF @ w_DF.T

  def error(format: Format) -> jax.Array:
    off_ZD = quantize(dy_ZF, format) @ w_DF.T - dx_ZD
    return jnp.median(jnp.linalg.norm(off_ZD, axis=-1) / jnp.linalg.norm(dx_ZD, axis=-1))

  return [error(format) for format in FORMATS[name]]


def threshold(imbalances: list[float], ratios: list[float]) -> float:
  """Returns the imbalance from which on squares fail, between neighbours linear in ln ratio.

  It is infinite where they never do.
  """
  logs = np.log(np.array(ratios) / TOO_MUCH)
  over = np.flatnonzero(logs > 0)
  if not len(over):
    return float("inf")
  first = int(over[0])
  if first == 0:
    return imbalances[0]
  share = -logs[first - 1] / (logs[first] - logs[first - 1])
  return float(imbalances[first - 1] + share * (imbalances[first] - imbalances[first - 1]))


class WatchedText(TextTask):
  """Is text whose evaluation says how unequal the tokens' gradients are."""

  def __init__(self, config: TrainConfig, text: TextData):
    super().__init__(config, text)
    self._sizes = jax.jit(self._token_sizes)

  def evaluate(
    self, params: Any, model_state: Any, rows: Any, limit: int | None = -1
  ) -> dict[str, float]:
    """Adds the standard deviation of ln |gradient of a token|, at the head's input."""
    values = super().evaluate(params, model_state, rows, limit)
    batch = next(iter(heldout_batches(self.text, batch=self.config.batch, rows=rows, limit=1)))
    sizes_BT = np.asarray(self._sizes(params, batch))
    return values | {"imbalance": float(np.log(sizes_BT[batch.weights_BT > 0]).std())}

  def _token_sizes(self, params: Any, batch: Batch) -> jax.Array:
    states_BTD = self.model.apply(params, batch.inputs_BT, logits=False)
    head = self.model.head(params)

    def loss(states_BTD: jax.Array) -> jax.Array:
      return next_token_loss(states_BTD, head, batch.targets_BT, batch.weights_BT)["loss"].num

    gradient_BTD = jax.grad(loss)(states_BTD).astype(jnp.float32)
    return jnp.linalg.norm(gradient_BTD, axis=-1)
