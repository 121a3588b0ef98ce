"""Defines training objectives: pure functions that return `Weighted` sums."""

from jaxlm.objectives.nested import distillation_loss, nested_loss
from jaxlm.objectives.next_token import next_token_loss, token_logprobs
from jaxlm.objectives.weighted import Weighted

__all__ = [
  "Weighted",
  "distillation_loss",
  "nested_loss",
  "next_token_loss",
  "token_logprobs",
]
