"""Configures training of several nested precisions at once."""

from __future__ import annotations

import dataclasses

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedConfig:
  """Configures a loss for each of several widths of one set of int8 codes (`objectives.nested`).

  What `model.quant` makes MatQuant weights is computed once for each width. (0.1, 0.1, 1) for
  8, 4 and 2 bits are the paper's weights for Gemma-2 (Nair et al. 2025, arXiv 2502.06786).
  """

  bits: tuple[int, ...] = ()
  """widths that are trained together, as in 8 4 2; none: what the rules say, alone"""
  weights: tuple[float, ...] = ()
  """of each width's loss in what is minimised, as in 0.1 0.1 1; 0 leaves it out"""
  distilled: tuple[float, ...] = ()
  """how much of each width's target is the output of the widest instead of the text, from 0 to 1,
  as in 0 0 0.5; by default none"""

  def __post_init__(self) -> None:
    check_finite(self, "nested.")
    for bits in self.bits:
      check(1 <= bits <= 8, "nested.bits", self.bits, "each must lie from 1 to 8")
    several = len(set(self.bits)) == len(self.bits)
    check(several, "nested.bits", self.bits, "must all be different")
    n = len(self.bits)
    check(len(self.weights) == n, "nested.weights", self.weights, f"must be one for each of {n}")
    positive = all(weight >= 0 for weight in self.weights) and (not n or any(self.weights))
    check(positive, "nested.weights", self.weights, "must be at least 0, and one above it")
    shares, rule = self.distilled, f"must be one for each of {n}, or none"
    check(len(shares) in (0, n), "nested.distilled", shares, rule)
    for bits, share in zip(self.bits, self.distilled):
      check(0 <= share <= 1, "nested.distilled", self.distilled, "each must lie from 0 to 1")
      rule = "the widest is the teacher: its target is the text"
      check(not share or bits < max(self.bits), "nested.distilled", self.distilled, rule)

  @property
  def passes(self) -> int:
    """Returns how often a training step runs the model forward and backward."""
    return sum(weight > 0 for weight in self.weights) or 1

  def __str__(self) -> str:
    shares = self.distilled or (0.0,) * len(self.bits)
    return ", ".join(
      f"int{bits} x {weight:g}" + (f" ({share:.0%} distilled)" if share else "")
      for bits, weight, share in zip(self.bits, self.weights, shares)
    )
