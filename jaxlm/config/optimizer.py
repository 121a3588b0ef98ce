"""Configures the update rule, the learning-rate schedule and clipping."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from jaxlm.config.checks import check, check_finite

OnNewSteps = Literal["extend", "keep", "decay"]
"""What a run that is resumed with another number of steps does with its learning rate.

extend: the schedule spans the new number of steps, so that the rate jumps where it has fallen.
keep: the schedule goes on as it was, and the rate stays where it ends. decay: from where it is, the
rate falls linearly to `final` times that at the new last step.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Configures the update rule, the learning-rate schedule and clipping."""

  name: Literal["adamw", "adam8bit", "muon", "adafactor"] = "adamw"
  """adamw; adam8bit: its moments in 8 bits, on one device; muon: orthogonalised momentum for
  matrices of the blocks, else adamw; adafactor"""
  learning_rate: float = 1e-3
  """peak"""
  schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
  """after the warm-up: cosine, warm-up-stable-decay, linear, constant"""
  warmup: int = 100
  """steps of linear warm-up from 0"""
  schedule_steps: int = 0
  """steps that the schedule spans; the rate stays where it ends; 0: all steps of the run"""
  cooldowns: tuple[int, ...] = ()
  """pairs of steps between which the rate falls once more, linearly to final times itself"""
  decay: float = 0.2
  """wsd: fraction of all steps spent in the final linear decay"""
  final: float = 0.1
  """learning rate at the last step / peak (cosine, wsd, linear)"""
  b1: float = 0.9
  """decay of the first moment (adamw)"""
  b2: float = 0.95
  """decay of the second moment (adamw)"""
  eps: float = 1e-8
  """added to the root of the second moment (adamw)"""
  momentum: float = 0.95
  """decay of the momentum (muon)"""
  muon_scale: float = 0.2
  """muon's update has this root mean square, so that one learning rate serves both groups"""
  weight_decay: float = 0.1
  """decoupled, times the learning rate; matrices only, never norms, biases or the embedding"""
  clip: float = 1.0
  """largest global gradient norm; 0 switches clipping off"""

  def __post_init__(self) -> None:
    check_finite(self, "optimizer.")
    check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0")
    for name in ("warmup", "schedule_steps"):
      value = getattr(self, name)
      check(value >= 0, f"optimizer.{name}", value, "must be at least 0")
    begins, ends = self.cooldowns[::2], self.cooldowns[1::2]
    fits = len(begins) == len(ends) and all(begin < end for begin, end in zip(begins, ends))
    fits = fits and all(begin < later for begin, later in itertools.pairwise((-1, *begins)))
    rule = "must be pairs of a first and a last step, in the order of the first"
    check(fits, "optimizer.cooldowns", self.cooldowns, rule)
    check(0 < self.decay <= 1, "optimizer.decay", self.decay, "must lie in (0, 1]")
    check(0 <= self.final <= 1, "optimizer.final", self.final, "must lie in [0, 1]")
    for name in ("b1", "b2", "momentum"):
      check(
        0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)"
      )
    for name in ("eps", "muon_scale"):
      check(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "must be above 0")
    for name in ("weight_decay", "clip"):
      check(
        getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must be at least 0"
      )
