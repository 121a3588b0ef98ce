"""Configures low precision: the rules that give number formats to matmuls by name.

A matmul with a weight is called by its path, as in "layers.3.mixer.q" or "head", and what decoding
keeps of a layer "cache.3.keys" and "cache.3.values", or by its branch in native sparse attention,
as in "cache.3.selected.keys". `ModelConfig.quant` is a list of rules; the first whose expression
matches the whole name says how it is computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxlm.config.checks import check
from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Format,
  LsqFormat,
  MatquantFormat,
  PactFormat,
  ParetoqFormat,
  QuestFormat,
  SparseFormat,
)
from pallas_kernels.common.checks import check_choice
from pallas_kernels.common.errors import UnsupportedError

CODES = ("e4m3fn", "e5m2", "int8")
WEIGHTS_ONLY = BitnetFormat | MatquantFormat | ParetoqFormat | SparseFormat

Operands = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]
"""Formats of the two operands of y = x w, dx = dy w^T and dw = x^T dy, in words."""


def _check_forward(weight: Format | None, activation: Format | None) -> None:
  """Raises UserError for formats that would round a forward pass at random."""
  for name, format in (("weight", weight), ("activation", activation)):
    random = isinstance(format, BlockFormat) and format.stochastic
    check(not random, f"quant.{name}", format, "only a gradient may be rounded at random")


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

  hadamard: int = 0
  """rotate blocks of so many tokens of x and dy in dw, by a Hadamard matrix with signs that are
  drawn anew; 0: no rotation"""

  def __post_init__(self) -> None:
    n = self.hadamard
    check(
      n == 0 or (n > 1 and n & (n - 1) == 0), "product.hadamard", n, "must be 0 or 2, 4, 8, ..."
    )
    _check_forward(self.weight, self.activation)

  def operands(self, dtype: str) -> Operands:
    """Returns the operands' formats in y, dx and dw, in words; plain ones are of `dtype`."""
    w, x, dy = (str(f or dtype) for f in (self.weight, self.activation, self.gradient))
    rotation = f" Hadamard-{self.hadamard}" if self.hadamard else ""
    return (x, w), (dy, w), (x + rotation, dy + rotation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockwiseProduct:
  """Configures a matmul whose three products multiply 8-bit codes with a scale for each block.

  It is DeepSeek-V3's recipe (`pallas_kernels.fp8_matmul`).
  There the gates of experts, embedding, head and norms are not quantised.
  """

  dtype: Literal["e4m3fn", "e5m2", "int8"] = "e4m3fn"
  """codes of weight and input"""
  bwd_dtype: Literal["e4m3fn", "e5m2", "int8"] | None = None
  """codes of the output's gradient; by default those of the others"""
  scale: Literal["f32", "pow2"] = "f32"
  """of scales: as they are, or rounded up to powers of two"""
  block: int = 128
  """numbers along the contracted axis for one scale"""
  save: Literal["bf16", "fp8"] = "bf16"
  """what the backward pass keeps: the input, or its codes, which need scales of powers of two"""
  allow_emulation: bool = False
  """also where the chip has no matrix unit for these codes, and multiplies them as wider floats"""

  def __post_init__(self) -> None:
    check_choice("product.dtype", self.dtype, CODES)
    check_choice("product.bwd_dtype", self.bwd_dtype, (None, *CODES))
    check_choice("product.scale", self.scale, ("f32", "pow2"))
    check_choice("product.save", self.save, ("bf16", "fp8"))
    check(self.block > 0, "product.block", self.block, "must be at least 1")
    alike = self.bwd_dtype is None or (self.dtype == "int8") == (self.bwd_dtype == "int8")
    check(alike, "product.bwd_dtype", self.bwd_dtype, f"does not go with dtype={self.dtype!r}")
    fits = self.save == "bf16" or self.scale == "pow2"
    check(fits, "product.save", self.save, 'needs scale="pow2"')

  def operands(self, dtype: str) -> Operands:
    """Returns the operands' formats in y, dx and dw, in words."""
    b, gradient = self.block, self.bwd_dtype or self.dtype
    note = f" {self.scale}" + (" emulated" if self.allow_emulation else "")
    w = f"{self.dtype} {b}x{b}{note}"
    along_d, along_f = f"{self.dtype} 1x{b}{note}", f"{gradient} 1x{b}{note}"
    return (along_d, w), (along_f, w), (f"{self.dtype} {b}x1{note}", f"{gradient} {b}x1{note}")


Product = EmulatedProduct | BlockwiseProduct
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
  hadamard: int = 0
  """rotate both operands, in blocks of so many entries of the contracted axis, before they are
  rounded, which changes no product: 2^k, or 12, 20, 28 or 40 times that; 0: no rotation"""
  product: Product | None = None
  """computes the matmul and both of its gradients"""
  packed: bool = False
  """the parameters are the weight's codes and scales in bytes, which do not train"""

  def __post_init__(self) -> None:
    others = self.weight or self.activation or self.gradient or self.hadamard
    alone = self.product is None or not others
    rule = "has formats of its own; it stands without weight, activation, gradient and hadamard"
    check(alone, "quant.product", self.product, rule)
    _check_forward(self.weight, self.activation)
    rule = "needs a format of the weight, and no other product"
    can_pack = self.weight is not None and self.product is None
    check(can_pack or not self.packed, "quant.packed", True, rule)
    for name in ("activation", "gradient"):
      format = getattr(self, name)
      rule = "is a format of weights alone"
      check(not isinstance(format, WEIGHTS_ONLY), f"quant.{name}", format, rule)
    learns = isinstance(self.gradient, LsqFormat | PactFormat)
    check(not learns, "quant.gradient", self.gradient, "a gradient cannot learn its scale")
    sparse = isinstance(self.activation, QuestFormat) and self.activation.sparse
    check(not sparse, "quant.activation", self.activation, "only weights are pruned")
    per_row = isinstance(self.activation, LsqFormat) and self.activation.shared == "row"
    rule = "an input can learn one step for the tensor, not one per row"
    check(not per_row, "quant.activation", self.activation, rule)

  @property
  def is_plain(self) -> bool:
    """Returns whether nothing is quantised."""
    return self == PLAIN

  def operands(self, dtype: str) -> Operands:
    """Returns the operands' formats in y, dx and dw, in words; plain ones are of `dtype`."""
    if self.product is not None:
      return self.product.operands(dtype)
    turned = f"Hadamard-{self.hadamard} " if self.hadamard else ""
    w, x = (turned + str(format or dtype) for format in (self.weight, self.activation))
    dy = str(self.gradient or dtype)
    return (x, w), (dy, w), (x, dy)


PLAIN = QuantSpec()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantRule:
  """Gives a spec to the matmuls whose whole name a regular expression matches."""

  match: str
  """as in "layers.*", or "layers[.](0|11)[.].*" for the layers 0 and 11"""
  spec: QuantSpec = PLAIN
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
  return PLAIN


def cache_name(layer: int, part: str) -> str:
  """Returns the name by which rules know a part of what decoding keeps of a layer."""
  return f"cache.{layer}.{part}"


def shared_spec(rules: Sequence[QuantRule], names: Sequence[str]) -> QuantSpec:
  """Returns the spec of all these names; raises UnsupportedError where theirs differ."""
  first, *others = {find_spec(rules, name) for name in names}
  if others:
    raise UnsupportedError(f"model.quant: {' and '.join(names)} are computed by one scan")
  return first


def check_cache(
  rules: Sequence[QuantRule], layer: int, cached: Iterable[str], states: Iterable[str]
) -> None:
  """Raises UserError where rules say what the cache of one layer cannot do.

  `cached` are the parts with keys and values, `states` those that no rule can round.
  """
  for part in states:
    name = cache_name(layer, part)
    rule = "is a state that each token changes, which decoding keeps as it is; name keys and values"
    check(find_spec(rules, name).is_plain, "model.quant", name, rule)
  rotations = {}
  for part in cached:
    name = cache_name(layer, part)
    check_cached(find_spec(rules, name), name)
    if name.endswith("keys"):
      rotations[name] = find_spec(rules, name).hadamard
  rule = "the same queries meet all keys of a layer, which are rotated alike"
  check(len(set(rotations.values())) <= 1, "quant.hadamard", rotations, rule)


def check_cached(spec: QuantSpec, name: str) -> None:
  """Raises UserError where a spec of keys or values says more than how each head's is rounded.

  A scale that positions or heads share would change what is cached already with each new one.
  """
  for field in ("weight", "gradient", "product", "packed"):
    value = getattr(spec, field)
    check(not value, f"quant.{field}", value, f"{name} is rounded as an activation, by that field")
  format = spec.activation
  learns = isinstance(format, LsqFormat | PactFormat)
  wide = format is not None and format.shared not in ("row", "group")
  wide |= isinstance(format, BlockFormat) and format.elements == "nvfp4"
  rule = f"{name} needs scales within one head of one position, which are not learned"
  check(not learns and not wide, "quant.activation", format, rule)
  rule = "only keys are rotated, with the queries"
  check(name.endswith(".keys") or not spec.hadamard, "quant.hadamard", spec.hadamard, rule)


def check_rules(rules: Sequence[QuantRule], names: Iterable[str]) -> None:
  """Raises UserError for a rule that decides none of these names."""
  left = list(names)
  for index, rule in enumerate(rules):
    others = [name for name in left if not re.fullmatch(rule.match, name)]
    reason = f"matches none of the names that earlier rules leave: {', '.join(left) or 'none'}"
    check(len(others) < len(left), f"model.quant.{index}.match", rule.match, reason)
    left = others
