"""Defines training objectives: pure functions that return `Weighted` sums."""

from jaxlm.objectives.next_token import next_token_loss, token_logprobs
from jaxlm.objectives.weighted import Weighted

__all__ = ["Weighted", "next_token_loss", "token_logprobs"]
