"""Small text models whose layers compute in few bits: what the studies of low precision train."""

from __future__ import annotations

import dataclasses
from typing import cast

from jaxlm.config import ModelConfig, QuantRule, QuantSpec, TrainConfig, check
from jaxlm.config.formats import Format, LsqFormat, QuestFormat, QuestLevels, UniformFormat
from jaxlm.recipes import Rules, load_rules
from jaxlm.scaling.sweep import text_tasks
from jaxlm.train.task import Task
from pallas_kernels.common.checks import check_choice

METHODS = ("STE", "LSQ", "QuEST", "QuEST, no Hadamard")
FULL = "16"
"""the precision of plain layers"""
_make_text_task = text_tasks()


def shape(D: int, layers: int) -> dict[str, int]:
  """Returns the fields of a model whose contracted axes have D entries, or 2 D in `down`.

  D is a power of two, so that a Hadamard block can have the model's width. Heads have 16 entries,
  or 64 from D = 256.
  """
  H = 64 if D >= 256 else 16
  first = "model.pattern.0."
  sizes = {f"{first}mixer.N": D // H, f"{first}mixer.K": D // H, f"{first}mixer.H": H}
  return {"model.D": D, "model.layers": layers, f"{first}feedforward.F": 2 * D, **sizes}


def quantized(config: TrainConfig, rules: Rules) -> tuple[TrainConfig, Task]:
  """Returns the run of text whose matmuls follow these rules, and its task."""
  model = dataclasses.replace(config.model, quant=rules)
  return _make_text_task(dataclasses.replace(config, model=model))


def make_task(
  config: TrainConfig, method: str = "", precision: str = FULL, recipe: str = ""
) -> tuple[TrainConfig, Task]:
  """Returns a run of text in few bits, for `sweep`: by a method at a precision, or by a recipe.

  The columns of its table are "task.method" and "task.precision" (`rules_of`), or "task.recipe", as
  in "paretoq:2" (`jaxlm.recipes`).
  """
  check(not (method and recipe), "recipe", recipe, f"the method is {method} already")
  rules = load_rules(recipe) if recipe else rules_of(config.model, method, precision)
  return quantized(config, rules)


def rules_of(model: ModelConfig, method: str, precision: str) -> Rules:
  """Returns one rule for all matmuls of the layers; embedding, norms and head stay as they are.

  `precision` is "16" (no rule), "W4A4", weights alone as "W4A16", or "FP4" (QuEST's levels, for
  both). STE rounds to levels up to the largest magnitude of each row or token; LSQ learns one step
  for each matrix and input, as the baseline of arXiv:2502.05003. Both have no level at 0, as QuEST,
  so that one bit means the same for all.
  """
  if precision == FULL:
    return ()
  weight, _, activation = precision.removeprefix("W").partition("A")
  spec = QuantSpec(
    weight=_format(model, method, weight),
    activation=None if activation == FULL else _format(model, method, activation or weight),
  )
  return (QuantRule(match="layers.*", spec=spec),)


def _format(model: ModelConfig, method: str, bits: str) -> Format:
  check_choice("method", method, METHODS)
  if method.startswith("QuEST"):
    levels = cast(QuestLevels, "fp4" if bits == "FP4" else f"int{bits}")
    block = 0 if method == "QuEST, no Hadamard" else min(model.D, 128)
    return QuestFormat(levels=levels, hadamard=block)
  check(bits.isdecimal(), "precision", bits, f"{method} has equally spaced levels alone")
  if method == "LSQ":
    return LsqFormat(bits=int(bits), grid="midrise", start="gaussian")
  return UniformFormat(bits=int(bits), grid="midrise")
