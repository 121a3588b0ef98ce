"""Configures a model: its sizes, and its layers as data; `jaxlm.config.compute` says how it runs.

The layers of a model are a prefix, a pattern that repeats, and a remainder. Each layer is one
`LayerSpec`, whose mixer and feed-forward are chosen independently, each by its own configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from jaxlm.config.checks import check, check_finite
from jaxlm.config.mixers import AttentionConfig, MixerConfig
from jaxlm.config.quant import QuantRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
  """Configures a gated feed-forward (`jaxlm.models.feedforward.mlp`)."""

  F: int = 352
  """width of the gated activations"""
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  """of the gate; gelu exactly, or in its tanh approximation"""
  bias: bool = False
  """biases on gate, up and down"""

  def __post_init__(self) -> None:
    check(self.F >= 1, "feedforward.F", self.F, "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
  """Pairs a mixer, which exchanges between positions, with a feed-forward, which does not."""

  mixer: MixerConfig = AttentionConfig()
  feedforward: MlpConfig = MlpConfig()


Stack = tuple[tuple[LayerSpec, ...], int]
"""Layers that are computed by one scan: the specs of one repeat in order, and how many repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Configures a decoder: embedding, layers, norm and head. It goes with the weights."""

  D: int = 128
  """width of the residual stream"""
  V: int = 256
  """vocabulary size; `train` raises it to the tokenizer's size if that is larger"""
  layers: int = 4
  """number of layers, prefix and remainder included"""
  prefix: tuple[LayerSpec, ...] = ()
  """layers before the pattern"""
  pattern: tuple[LayerSpec, ...] = (LayerSpec(),)
  """layers that repeat until, with prefix and remainder, there are `layers` of them"""
  remainder: tuple[LayerSpec, ...] = ()
  """layers after the pattern"""
  tied: bool = False
  """the head is the transposed embedding"""
  embed_scale: Literal["one", "root_width"] = "one"
  """factor on the embedding at the input: 1, or the root of D rounded to the compute type"""
  norm_eps: float = 1e-6
  """added to the mean square in RMSNorm"""
  norm_offset: Literal[0, 1] = 0
  """norms multiply by this plus their weight, and the weight starts at 1 minus this"""
  post_norms: bool = False
  """norm the outputs of mixer and feed-forward too, before they join the residual stream"""
  logit_cap: float | None = None
  """soft cap c of the logits a, c tanh(a / c); None: not capped"""
  quant: tuple[QuantRule, ...] = ()
  """formats of the matmuls, by their names; the first rule that matches decides; none: plain"""
  max_length: int | None = None
  """longest context that published weights are meant for; kept for other tools, unused here"""

  def __post_init__(self) -> None:
    check_finite(self, "model.")
    for name in ("D", "V", "layers"):
      check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
    check(len(self.pattern) > 0, "model.pattern", self.pattern, "needs at least one layer")
    ends, pattern = len(self.prefix) + len(self.remainder), len(self.pattern)
    rule = f"must be {ends} (prefix and remainder) plus a multiple of {pattern} (pattern)"
    fits = self.layers >= ends and (self.layers - ends) % pattern == 0
    check(fits, "model.layers", self.layers, rule)
    check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be above 0")
    check(self.norm_offset in (0, 1), "model.norm_offset", self.norm_offset, "must be 0 or 1")
    for name in ("max_length", "logit_cap"):
      value = getattr(self, name)
      check(value is None or value > 0, f"model.{name}", value, "must be above 0, or None")

  @property
  def stacks(self) -> tuple[Stack, ...]:
    """Returns the layers in order as stacks; equal neighbours of prefix and remainder are one."""
    repeats = (self.layers - len(self.prefix) - len(self.remainder)) // len(self.pattern)
    pattern = ((self.pattern, repeats),) if repeats else ()
    return _runs(self.prefix) + pattern + _runs(self.remainder)

  @property
  def layer_specs(self) -> tuple[LayerSpec, ...]:
    """Returns the spec of every layer, in order."""
    return tuple(spec for specs, repeats in self.stacks for spec in specs * repeats)


def _runs(specs: tuple[LayerSpec, ...]) -> tuple[Stack, ...]:
  return tuple(((spec,), len(tuple(run))) for spec, run in itertools.groupby(specs))
