"""Evaluates a model with planted outliers in few bits, rotated in several ways."""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.outliers import calibration_batches, check_same_logits, plant_outliers
from jaxlm.config import ModelConfig, QuantRule, TrainConfig
from jaxlm.config.quant import find_spec
from jaxlm.data.packing import Batch
from jaxlm.quant.apply import turn
from jaxlm.quant.capture import capture
from jaxlm.quant.kurtosis import kurtosis
from jaxlm.quant.learned_rotation import Rotations, learn_rotations
from jaxlm.quant.rotation import (
  Params,
  draw_rotations,
  fold_norms,
  random_hadamard,
  random_orthogonal,
  rotate_heads,
  rotate_residual,
)
from jaxlm.recipes import Rules, spinquant
from jaxlm.run.text import TextTask
from jaxlm.train.evaluate import make_evaluator

RANDOM = {"Hadamard": random_hadamard, "orthogonal": random_orthogonal}
LEARNED = {"learned": 1.5, "learned at 0.15": 0.15, "learned at 0.015": 0.015}
"""rates of Cayley SGD, the published one first, which decides"""
METHODS = (*RANDOM, *LEARNED)
PLACES = ("residual", "heads", "down")
"""what a matmul reads: the normed residual stream, attention's output, the gated activations"""
CALIBRATED = 8
"""batches whose mean is the calibration loss"""
ROTATION_TOLERANCE = 1e-4
"""by which logits may differ after a rotation, which sums outliers and channels 32 times smaller"""


class RotationTask(TextTask):
  """Trains a plain model; evaluates it with outliers and in few bits, rotated in several ways."""

  def __init__(self, config: TrainConfig, task: TextTask, draws: int, learned_steps: int):
    super().__init__(config, task.text)
    self.draws, self.learned_steps = draws, learned_steps
    folded = dataclasses.replace(config.model, tied=False)
    self.plain = folded
    self.rounded = self._with_rules(spinquant(4, 4, 4, 0))
    self.rules = rules_of(folded)
    self.turned = self._with_rules(self.rules)
    self._read_rows = make_evaluator(self.turned.objective)
    self._kurtosis = jax.jit(self._measure_kurtosis)

  def _with_rules(self, rules: Rules) -> TextTask:
    model = dataclasses.replace(self.plain, quant=rules)
    return TextTask(dataclasses.replace(self.config, model=model), self.text)

  def evaluate(
    self, params: Any, model_state: Any, rows: Any, limit: int | None = -1
  ) -> dict[str, float]:
    """Returns losses "METHOD I loss", also on the calibration rows, and "METHOD PLACE kurtosis"."""
    numbers = super().evaluate(params, model_state, rows, limit)
    calibration = calibration_batches(self, max(self.learned_steps, CALIBRATED), rows)
    ids_BT = jnp.asarray(calibration[0].inputs_BT)
    _, folded = fold_norms(self.config.model, params)
    _, planted = plant_outliers(self.config.model, params, ids_BT)

    def loss(task: TextTask, params: Params) -> float:
      return task.evaluate(params, {}, rows)["heldout_loss"]

    numbers |= {
      "before loss": loss(self.rounded, folded),
      "planted loss": loss(self.rounded, planted),
      "online only loss": loss(self.turned, planted),
    }
    numbers |= self._tails("before", folded, ids_BT) | self._tails("planted", planted, ids_BT)
    changes = []
    for method in METHODS:
      for index in range(self.draws):
        rotations = self._rotations(method, index, planted, calibration)
        rotated = rotate(self.plain, planted, rotations)
        models = (self.plain, planted), (self.plain, rotated)
        changes.append(check_same_logits(*models, ids_BT, ROTATION_TOLERANCE))
        name = f"{method} {index}"
        numbers[f"{name} loss"] = loss(self.turned, rotated)
        terms = self._read_rows(rotated, {}, calibration[:CALIBRATED])
        numbers[f"{name} calibration loss"] = float(terms["loss"].mean())
        if not index:
          numbers |= self._tails(method, rotated, ids_BT)
        if not index and method == "Hadamard":
          numbers["folded only loss"] = loss(self.rounded, rotated)
    return numbers | {"change by rotations": max(changes)}

  def _rotations(
    self, method: str, index: int, planted: Params, calibration: list[Batch]
  ) -> Rotations:
    """Returns R1 and R2; learned ones start from the Hadamard matrices of the same index."""
    key = jax.random.key(index)
    start = Rotations(*draw_rotations(self.plain, key, RANDOM.get(method, random_hadamard)))
    if method in RANDOM:
      return start
    return learn_rotations(
      self.plain,
      planted,
      self._quantized_loss,
      calibration,
      key=key,
      steps=self.learned_steps,
      rate=LEARNED[method],
      start=start,
    )

  def _quantized_loss(self, params: Params, batch: Batch) -> jax.Array:
    return self.turned.objective(params, {}, batch, jax.random.key(0))["loss"].mean()

  def _measure_kurtosis(self, params: Params, ids_BT: jax.Array) -> dict[str, Any]:
    """Returns by matmul the kurtosis of its input, as it is and as the rules turn it."""

    def read(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
      return kurtosis(x_BTD), kurtosis(turn(x_BTD, find_spec(self.rules, name).hadamard))

    return capture(self.plain, params, ids_BT, read)

  def _tails(self, method: str, params: Params, ids_BT: jax.Array) -> dict[str, float]:
    """Returns the mean kurtosis of each place, and the largest of all matmuls."""
    both = jax.device_get(self._kurtosis(params, ids_BT))
    turned = method in METHODS
    places = {name: place_of(name) for name in both}
    numbers = {
      f"{method} {place} kurtosis": float(
        np.mean([both[name][turned] for name in both if places[name] == place])
      )
      for place in PLACES
    }
    largest = float(max(pair[turned] for pair in both.values()))
    return numbers | {f"{method} largest kurtosis": largest}


def rules_of(model: ModelConfig) -> Rules:
  """Returns the rules of W4A4KV4 with R3 as wide as a head, and R4 as wide as the feed-forward."""
  first = model.layer_specs[0]
  down, *others = spinquant(4, 4, 4, first.mixer.H)
  return (
    QuantRule(match=down.match, spec=dataclasses.replace(down.spec, hadamard=first.feedforward.F)),
    *others,
  )


def rotate(config: ModelConfig, params: Params, rotations: Rotations) -> Params:
  """Returns the parameters with R1 and R2 folded into them."""
  return rotate_heads(config, rotate_residual(config, params, rotations.r1), rotations.r2)


def place_of(name: str) -> str:
  """Returns which of `PLACES` a matmul reads."""
  return {"o": "heads", "down": "down"}.get(name.rpartition(".")[2], "residual")
