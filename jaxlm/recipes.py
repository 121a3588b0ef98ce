"""Defines rule lists by name, for `--quantize`. Imports no jax.

A recipe is a name and numbers, as in "quest:4:4" or "int4"; a file of rules in JSON does as well.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from jaxlm.config import ModelConfig, QuantRule, QuantSpec, check
from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Format,
  LsqFormat,
  MatquantFormat,
  ParetoqFormat,
  QuestFormat,
  QuestLevels,
  UniformFormat,
)
from jaxlm.config.quant import BlockwiseProduct, EmulatedProduct
from jaxlm.config_json import from_dict, to_dict
from pallas_kernels.common.errors import UserError

Rules = tuple[QuantRule, ...]
_LAYERS = "layers.*"


def _layers(weight: Format | None, activation: Format | None = None) -> Rules:
  """Returns one rule for all matmuls of the layers; embedding, norms and head stay as they are."""
  return (QuantRule(match=_LAYERS, spec=QuantSpec(weight=weight, activation=activation)),)


def int4(group: int = 128) -> Rules:
  """Rounds weights to int4 with a bfloat16 scale for a group: int4:GROUP."""
  return _layers(UniformFormat(bits=4, shared="group", size=group, scale_dtype="bfloat16"))


def int8() -> Rules:
  """Rounds weights to int8 with a scale per row."""
  return _layers(UniformFormat(bits=8))


def affine(bits: int = 4) -> Rules:
  """Rounds weights to levels from the least to the largest of each row: affine:BITS."""
  return _layers(UniformFormat(bits=bits, grid="affine"))


def minmax(weight_bits: int = 4, activation_bits: int = 8) -> Rules:
  """Rounds weights per row and activations per token, straight through: minmax:WEIGHT:ACTIVATION.

  It is plain QAT, and on the text of `jaxlm own_text` LLM-QAT (arXiv 2305.17888).
  """
  return _layers(UniformFormat(bits=weight_bits), UniformFormat(bits=activation_bits))


def lsq(weight_bits: int = 4, activation_bits: int = 4) -> Rules:
  """Learns one step per matrix and per input: lsq:WEIGHT:ACTIVATION."""
  return _layers(LsqFormat(bits=weight_bits), LsqFormat(bits=activation_bits))


def quest(weight_bits: int = 4, activation_bits: int = 4, hadamard: int = 128) -> Rules:
  """Trains as QuEST does: quest:WEIGHT:ACTIVATION:HADAMARD (16 activation bits: not rounded)."""

  def format(bits: int) -> QuestFormat:
    return QuestFormat(levels=cast(QuestLevels, f"int{bits}"), hadamard=hadamard)

  return _layers(format(weight_bits), None if activation_bits == 16 else format(activation_bits))


def paretoq(bits: str = "4") -> Rules:
  """Trains weights as ParetoQ does: paretoq:BITS of 1, ternary, 2, 3, 4."""
  names = ("1", "ternary", "2", "3", "4")
  check(bits in names, "recipe", f"paretoq:{bits}", f"must be of {', '.join(names)}")
  return _layers(ParetoqFormat(bits=cast(Literal["1", "ternary", "2", "3", "4"], bits)))


def bitnet() -> Rules:
  """Trains ternary weights and int8 activations (BitNet b1.58)."""
  return _layers(BitnetFormat(), UniformFormat(bits=8))


def matquant(bits: int = 8) -> Rules:
  """Takes the top bits of int8 weights of the feed-forwards: matquant:BITS."""
  return (QuantRule(match=".*feedforward.*", spec=QuantSpec(weight=MatquantFormat(bits=bits))),)


def spinquant(weights: int = 4, activations: int = 4, cache: int = 4, hadamard: int = 32) -> Rules:
  """Rounds as SpinQuant does: spinquant:WEIGHT:ACTIVATION:CACHE:HADAMARD (16: not rounded).

  Rotated where the network runs are queries with keys (R3) and what `down` takes (R4), in blocks of
  so many entries; R1 and R2 are `jaxlm.quant.rotation`'s, to be folded into weights before.
  """

  def format(bits: int, grid: Literal["symmetric", "affine"]) -> Format | None:
    return None if bits == 16 else UniformFormat(bits=bits, grid=grid)

  weight, activation = format(weights, "symmetric"), format(activations, "affine")
  kept = format(cache, "affine")
  down = QuantSpec(weight=weight, activation=activation, hadamard=hadamard)
  return (
    QuantRule(match="layers.*[.]down", spec=down),
    *_layers(weight, activation),
    QuantRule(match="cache.*[.]keys", spec=QuantSpec(activation=kept, hadamard=hadamard)),
    QuantRule(match="cache.*[.]values", spec=QuantSpec(activation=kept)),
  )


def mxfp4(hadamard: int = 32) -> Rules:
  """Computes all three products in MXFP4, gradients rounded at random: mxfp4:HADAMARD."""
  return _three("mxfp4", hadamard)


def nvfp4(hadamard: int = 16) -> Rules:
  """Computes all three products in NVFP4, weights in 16x16 blocks: nvfp4:HADAMARD."""
  return _three("nvfp4", hadamard)


def fp8(emulate: int = 0) -> Rules:
  """Multiplies e4m3 codes with scales by block, as DeepSeek-V3: fp8, or fp8:1 on any chip."""
  product = BlockwiseProduct(allow_emulation=bool(emulate))
  return (QuantRule(match=_LAYERS, spec=QuantSpec(product=product)),)


def _three(elements: Literal["mxfp4", "nvfp4"], hadamard: int) -> Rules:
  product = EmulatedProduct(
    weight=BlockFormat(elements=elements, shared="block" if elements == "nvfp4" else "group"),
    activation=BlockFormat(elements=elements),
    gradient=BlockFormat(elements=elements, stochastic=True),
    hadamard=hadamard,
  )
  return (QuantRule(match=_LAYERS, spec=QuantSpec(product=product)),)


RECIPES: dict[str, Callable[..., Rules]] = {
  function.__name__: function
  for function in (
    int4,
    int8,
    affine,
    minmax,
    lsq,
    quest,
    paretoq,
    bitnet,
    matquant,
    spinquant,
    mxfp4,
    nvfp4,
    fp8,
  )
}


def load_rules(name: str) -> Rules:
  """Returns the rules of a recipe, as in "quest:4:4", or of a JSON file as `save_rules` writes it.

  Raises UserError, with the nearest names, where there is no such recipe.
  """
  if name.endswith(".json"):
    path = Path(name)
    check(path.is_file(), "recipe", name, "there is no such file")
    return from_dict(ModelConfig, {"quant": json.loads(path.read_text())}).quant
  recipe, *numbers = name.split(":")
  if recipe not in RECIPES:
    near = ", ".join(difflib.get_close_matches(recipe, RECIPES, n=3) or RECIPES)
    raise UserError(f"recipe={name!r}: does not exist; nearest: {near}")
  parameters = inspect.signature(RECIPES[recipe]).parameters
  rule = f"takes at most {len(parameters)} values: {_first_line(RECIPES[recipe])}"
  check(len(numbers) <= len(parameters), "recipe", name, rule)
  is_text = recipe == "paretoq"
  check(is_text or all(n.isdecimal() for n in numbers), "recipe", name, "must be whole numbers")
  return RECIPES[recipe](*(numbers if is_text else map(int, numbers)))


def save_rules(rules: Rules, path: Path) -> None:
  """Writes rules as JSON, to be edited."""
  values = to_dict(ModelConfig(quant=rules))["quant"]
  path.write_text(json.dumps(values, indent=1) + "\n")


def list_recipes() -> str:
  """Returns one line for each recipe."""
  return "\n".join(f"  {name:<10} {_first_line(function)}" for name, function in RECIPES.items())


def _first_line(function: Callable) -> str:
  return (function.__doc__ or "").splitlines()[0]
