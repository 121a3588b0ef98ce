"""Attends by a state that decays, erases and writes: the delta rule with general gates."""

from pallas_kernels.delta_attention.api import delta_attention, delta_step
from pallas_kernels.delta_attention.presets import (
  delta_net,
  gated_delta_rule,
  gated_delta_rule_2,
  gated_linear_attention,
  kimi_delta_attention,
  lightning_attention,
)

__all__ = [
  "delta_attention",
  "delta_net",
  "delta_step",
  "gated_delta_rule",
  "gated_delta_rule_2",
  "gated_linear_attention",
  "kimi_delta_attention",
  "lightning_attention",
]
