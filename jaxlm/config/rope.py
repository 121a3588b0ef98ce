"""Configures the rotary position embedding and its context extensions."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Configures rotary position embedding and its extensions (frequencies: `jaxlm.models.rope`)."""

  theta: float = 10_000.0
  """base of the frequencies theta^(-2j/H)"""
  scaling: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = "none"
  """how the frequencies are stretched to longer contexts"""
  factor: float = 1.0
  """new length / original length"""
  original_length: int = 4096
  """context length before the extension (dynamic, yarn, llama3)"""
  beta_fast: float = 32.0
  """yarn: rotations within original_length above which a frequency is kept"""
  beta_slow: float = 1.0
  """yarn: rotations within original_length below which a frequency is divided by factor"""
  truncate: bool = True
  """yarn: round the two borders to whole indices"""
  attention_factor: float | None = None
  """yarn: factor on cos and sin; by default 0.1 ln(factor) + 1, or from the two mscales"""
  mscale: float | None = None
  """yarn: numerator of the attention factor (DeepSeek)"""
  mscale_all_dim: float | None = None
  """yarn: denominator of the attention factor (DeepSeek)"""
  low_freq_factor: float = 1.0
  """llama3: wavelengths over original_length / this are divided by factor"""
  high_freq_factor: float = 4.0
  """llama3: wavelengths under original_length / this are kept"""

  def __post_init__(self) -> None:
    check_finite(self, "rope.")
    check(self.theta > 1, "rope.theta", self.theta, "must be above 1")
    check(self.factor >= 1, "rope.factor", self.factor, "must be at least 1")
    length = self.original_length
    check(length >= 1, "rope.original_length", length, "must be at least 1")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
      value = getattr(self, name)
      rule = f"belongs to yarn, not to scaling={self.scaling}"
      check(self.scaling == "yarn" or value is None, f"rope.{name}", value, rule)
    rule = f"must be below high_freq_factor={self.high_freq_factor}"
    low = self.low_freq_factor
    check(low < self.high_freq_factor, "rope.low_freq_factor", low, rule)
