"""Rules for learning rate, batch and width, with the range in which their sources fitted them.

Three published rules differ threefold at the same model and tokens, and the loss is flat within a
factor of 1.5 in the learning rate: take them as a place to start a sweep.
"""

# N parameters, D training tokens, C training FLOPs

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from jaxlm.config import check


class Peak(NamedTuple):
  """Holds a peak learning rate of AdamW and the tokens of one update."""

  learning_rate: Any
  batch_tokens: Any


def step_law(N: Any, D: Any) -> Peak:
  """Returns 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 (Step Law, arXiv:2503.04715, equation 1).

  N counts the layers alone. Fitted for N of 2.1e8 to 1.1e9 and D of 4e9 to 1e11, cosine to a fixed
  1e-5, rows of 2048 tokens. At a fixed batch the same runs want less learning rate for more tokens
  or none at all: the rule follows the best batch of each D.
  """
  return Peak(1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571)


def deepseek(C: Any) -> Peak:
  """Returns 0.3118 C^-0.1250 and 0.2920 C^0.3271 tokens (DeepSeek LLM, arXiv:2401.02954, eq. 1).

  C is M D, with M the FLOPs per token without embeddings; a multi-step schedule.
  """
  return Peak(0.3118 * C**-0.1250, 0.2920 * C**0.3271)


def deepseek_allocation(C: float) -> tuple[float, float]:
  """Returns M = 0.1715 C^0.5243 FLOPs a token, D = 5.8316 C^0.4757 (arXiv:2401.02954, eq. 4)."""
  return 0.1715 * C**0.5243, 5.8316 * C**0.4757


def porian(N: Any) -> Peak:
  """Returns 0.0047 (N / 108e6)^(-1/3) and 160 (N / 108e6)^(2/3) rows of 2048 (arXiv:2406.19146).

  N counts layers and head; D = 20 N, constant learning rate.
  """
  relative = N / 108e6
  return Peak(0.0047 * relative ** (-1 / 3), 160 * 2048 * relative ** (2 / 3))


def rescale_to_horizon(learning_rate: Any, D: Any, new_D: Any, *, exponent: float = 0.32) -> Any:
  """Returns the learning rate for another number of tokens at the same batch: lr (new_D / D)^-0.32.

  Bjorck et al., arXiv:2409.19913, section 4; models up to 2.7e9 parameters at 0.5M tokens a batch.
  """
  return learning_rate * (new_D / D) ** -exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
  """Holds the factors on a tuned base model's hyperparameters when it grows in width and depth."""

  hidden_init_variance: float
  hidden_learning_rate: float
  other_learning_rate: float
  """of norms and biases; the embedding keeps the base's"""
  logits: float
  attention: Literal["1/sqrt(H)", "1/H"]
  residual_branch: float
  epsilon: float
  hidden_weight_decay: float


def parametrization(
  kind: Literal["sp", "mup", "completep"], *, width: float, depth: float = 1.0
) -> Parametrization:
  """Returns the factors for `width` and `depth` times the base model's, with Adam.

  "mup" is arXiv:2203.03466, table 8; "completep" arXiv:2505.01618, table 1, with alpha = 1. Both
  carry over width (completep over depth too), neither over tokens nor over batch.
  """
  check(width > 0, "width", width, "must be a positive factor")
  check(depth > 0, "depth", depth, "must be a positive factor")
  check(kind in ("sp", "mup", "completep"), "kind", kind, "must be sp, mup or completep")
  if kind == "sp":
    width = depth = 1.0
  deep = kind == "completep"
  return Parametrization(
    hidden_init_variance=1 / width,
    hidden_learning_rate=1 / width,
    other_learning_rate=1.0,
    logits=1 / width,
    attention="1/sqrt(H)" if kind == "sp" else "1/H",
    residual_branch=1 / depth if deep else 1.0,
    epsilon=1 / (width * depth) if deep else 1.0,
    hidden_weight_decay=width if deep else 1.0,
  )


def critical_batch(loss: Any, *, tokens: float = 2e8, exponent: float = 0.21) -> Any:
  """Returns the tokens of a batch beyond which steps are hardly saved: tokens / loss^(1 / 0.21).

  Kaplan et al., arXiv:2001.08361, equation 1.4; the loss is in nats per token of WebText2.
  """
  return tokens / loss ** (1 / exponent)
