"""Configures low precision: number formats, and the rules that give them to matmuls by name.

A matmul with a weight is called by its path, as in "layers.3.mixer.q" or "head".
`ModelConfig.quant` is a list of rules; the first whose expression matches the whole name says how
it is computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxlm.config.checks import check, check_finite

Shared = Literal["tensor", "row", "group", "block"]
"""What shares one scale: the tensor; a row, along the contracted axis (an output channel of a
weight, a token of activations); `size` neighbours along that axis; a square of `size` x `size`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformFormat:
  """Configures equally spaced levels (`jaxlm.quant.uniform`)."""

  bits: int = 4
  """of a code, from 1 (midrise), 2 (others) to 8"""
  grid: Literal["symmetric", "affine", "midrise"] = "symmetric"
  """symmetric: with a level at 0 and one more below than above it; affine: from the smallest value
  to the largest; midrise: no level at 0, as many below as above"""
  shared: Shared = "row"
  """what shares one scale: tensor, row, group or block"""
  size: int = 128
  """entries along the contracted axis of a group, or along both of a block"""
  ratio: float = 1.0
  """the largest level is this times the largest magnitude (the whole range, if affine)"""
  clips_gradient: bool = False
  """no gradient where a value lies beyond the levels; otherwise all of it everywhere"""

  def __post_init__(self) -> None:
    check_finite(self, "format.")
    least = 1 if self.grid == "midrise" else 2
    check(least <= self.bits <= 8, "format.bits", self.bits, f"must lie from {least} to 8")
    check(self.size >= 1, "format.size", self.size, "must be at least 1")
    check(0 < self.ratio <= 1, "format.ratio", self.ratio, "must lie in (0, 1]")

  def __str__(self) -> str:
    return f"int{self.bits} {self.grid} {_describe_sharing(self.shared, self.size)}"


Format = UniformFormat
"""A number format, with the gradient of its paper."""
Operands = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]
"""Formats of the two operands of y = x w, dx = dy w^T and dw = x^T dy, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedProduct:
  """Configures a matmul of which all three products take narrow operands.

  y = x w, dx = dy w^T and dw = x^T dy quantise both of their operands, each along the axis that it
  contracts, and multiply in the compute type (`jaxlm.quant.products`).
  """

  weight: Format | None = None
  """of w, in y and in dx"""
  activation: Format | None = None
  """of x, in y and in dw"""
  gradient: Format | None = None
  """of dy, in dx and in dw"""

  def operands(self, dtype: str) -> Operands:
    """Returns the operands' formats in y, dx and dw, in words; plain ones are of `dtype`."""
    w, x, dy = (str(f or dtype) for f in (self.weight, self.activation, self.gradient))
    return (x, w), (dy, w), (x, dy)


Product = EmulatedProduct
"""A way to compute a matmul and its gradients in place of the plain ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
  """Configures how one matmul is computed; without fields, plainly in the compute type.

  Either formats of its operands, or `product`, which replaces the matmul and its gradients.
  """

  weight: Format | None = None
  """of the weight, scales along the contracted axis"""
  activation: Format | None = None
  """of the input"""
  gradient: Format | None = None
  """of the output's gradient, before the two matmuls of the backward pass"""
  product: Product | None = None
  """computes the matmul and both of its gradients"""

  def __post_init__(self) -> None:
    alone = self.product is None or not (self.weight or self.activation or self.gradient)
    rule = "has formats of its own; weight, activation and gradient must be None beside it"
    check(alone, "quant.product", self.product, rule)

  @property
  def is_plain(self) -> bool:
    """Returns whether nothing is quantised."""
    return self == QuantSpec()

  def operands(self, dtype: str) -> Operands:
    """Returns the operands' formats in y, dx and dw, in words; plain ones are of `dtype`."""
    if self.product is not None:
      return self.product.operands(dtype)
    w, x, dy = (str(f or dtype) for f in (self.weight, self.activation, self.gradient))
    return (x, w), (dy, w), (x, dy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantRule:
  """Gives a spec to the matmuls whose whole name a regular expression matches."""

  match: str
  """as in "layers.*", or "layers[.](0|11)[.].*" for the layers 0 and 11"""
  spec: QuantSpec = QuantSpec()
  """by default plain, which takes these matmuls out of the rules that follow"""

  def __post_init__(self) -> None:
    try:
      re.compile(self.match)
    except re.error as error:
      check(False, "quant.match", self.match, f"is not a regular expression: {error}")


def find_spec(rules: Sequence[QuantRule], name: str) -> QuantSpec:
  """Returns the spec of the first rule that matches the whole name; a plain one where none does."""
  for rule in rules:
    if re.fullmatch(rule.match, name):
      return rule.spec
  return QuantSpec()


def check_rules(rules: Sequence[QuantRule], names: Iterable[str]) -> None:
  """Raises UserError for a rule that decides none of these names."""
  left = list(names)
  for index, rule in enumerate(rules):
    others = [name for name in left if not re.fullmatch(rule.match, name)]
    reason = f"matches none of the matmuls that earlier rules leave: {', '.join(left) or 'none'}"
    check(len(others) < len(left), f"model.quant.{index}.match", rule.match, reason)
    left = others


def _describe_sharing(shared: Shared, size: int) -> str:
  return {"group": f"per 1x{size}", "block": f"per {size}x{size}"}.get(shared, f"per {shared}")
