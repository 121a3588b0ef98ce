"""Takes another number of bits from the same int8 codes: of all layers, or of each layer.

Mix'n'Match of Nair et al. 2025, arXiv 2502.06786: any mean width without training.
"""

# L layers

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Literal

from jaxlm.config import ModelConfig, QuantRule, check
from jaxlm.config.formats import MatquantFormat
from jaxlm.config.quant import find_spec
from jaxlm.models.parts import list_matmuls

Order = Literal["pyramid", "reverse pyramid", "increasing", "decreasing"]
"""Where the widest layers are: in the middle, at both ends, at the end, at the start."""
WIDTHS = (8, 4, 2)


def slice_model(config: ModelConfig, bits: int) -> ModelConfig:
  """Returns the model whose nested weights have these bits in every layer.

  Raises UserError where no rule makes weights MatQuant's.
  """
  _check_nested(config)
  rules = tuple(_with_bits(rule, bits) for rule in config.quant)
  return dataclasses.replace(config, quant=rules)


def mix_model(config: ModelConfig, bits_L: Sequence[int]) -> ModelConfig:
  """Returns the model whose nested weights have `bits_L[l]` bits in layer l.

  Each rule of such weights becomes one for each width and its layers; other rules stay.
  """
  _check_nested(config)
  check(len(bits_L) == config.layers, "bits_L", bits_L, f"must be {config.layers}, one per layer")
  left = {name for matmul in list_matmuls(config) for name in matmul.names}
  rules: list[QuantRule] = []
  for rule in config.quant:
    decided = {name for name in left if re.fullmatch(rule.match, name)}
    left -= decided
    if not isinstance(rule.spec.weight, MatquantFormat):
      rules.append(rule)
      continue
    layers = {int(name.split(".")[1]) for name in decided if name.startswith("layers.")}
    for bits in sorted({bits_L[layer] for layer in layers}, reverse=True):
      own = "|".join(str(layer) for layer in sorted(layers) if bits_L[layer] == bits)
      match = f"(?=layers[.]({own})[.])(?:{rule.match})"
      rules.append(_with_bits(dataclasses.replace(rule, match=match), bits))
    if any(not name.startswith("layers.") for name in decided):
      rules.append(rule)
  return dataclasses.replace(config, quant=tuple(rules))


def mean_bits(config: ModelConfig, bits_L: Sequence[int]) -> float:
  """Returns the bits per nested weight of a mix, over the weights in layers."""
  sizes_L = _sizes(config)
  return sum(size * bits for size, bits in zip(sizes_L, bits_L)) / sum(sizes_L)


def mixes(
  layers: int, order: Order = "pyramid", widths: Sequence[int] = WIDTHS
) -> list[tuple[int, ...]]:
  """Returns the bits of each layer for every way to divide the layers among the widths, in order.

  No layer has more bits than one that comes before it in the order.
  """
  ranked = _rank(layers, order)
  descending = sorted(widths, reverse=True)
  all_bits = itertools.combinations_with_replacement(descending, layers)
  return [tuple(bits for _, bits in sorted(zip(ranked, mix))) for mix in all_bits]


def mix_within(
  config: ModelConfig, budget: float, order: Order = "pyramid", widths: Sequence[int] = WIDTHS
) -> tuple[int, ...]:
  """Returns the bits of each layer with the most bits on average that are not above `budget`.

  Of equal ones it is that whose widths differ least: the loss is convex in the bits.
  """
  check(budget >= min(widths), "budget", budget, f"must be at least {min(widths)} bits per weight")
  within = [mix for mix in mixes(config.layers, order, widths) if mean_bits(config, mix) <= budget]
  return max(within, key=lambda mix: (mean_bits(config, mix), -sum(bits**2 for bits in mix)))


def _check_nested(config: ModelConfig) -> None:
  nested = any(isinstance(rule.spec.weight, MatquantFormat) for rule in config.quant)
  rule = "has no rule whose weights are the top bits of int8 codes, as of the recipe matquant"
  check(nested, "model.quant", config.quant, rule)


def _with_bits(rule: QuantRule, bits: int) -> QuantRule:
  weight = rule.spec.weight
  if not isinstance(weight, MatquantFormat):
    return rule
  spec = dataclasses.replace(rule.spec, weight=dataclasses.replace(weight, bits=bits))
  return dataclasses.replace(rule, spec=spec)


def _rank(layers: int, order: Order) -> list[int]:
  """Returns the layers from the one that gets most bits to the one that gets fewest."""
  centre = (layers - 1) / 2
  by_place = {
    "pyramid": lambda layer: abs(layer - centre),
    "reverse pyramid": lambda layer: -abs(layer - centre),
    "increasing": lambda layer: -layer,
    "decreasing": lambda layer: layer,
  }
  return sorted(range(layers), key=by_place[order])


def _sizes(config: ModelConfig) -> list[int]:
  """Returns the number of nested weights of each layer."""
  sizes_L = [0] * config.layers
  for matmul in list_matmuls(config):
    for name in matmul.names:
      weight = find_spec(config.quant, name).weight
      if name.startswith("layers.") and isinstance(weight, MatquantFormat):
        sizes_L[int(name.split(".")[1])] += matmul.shape[0] * matmul.shape[1]
  return sizes_L
