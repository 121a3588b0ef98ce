"""Configures mixers, the layers that exchange information between positions: one record each."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from jaxlm.config.checks import check, check_finite
from jaxlm.config.rope import RopeConfig

Heads = dict[str, tuple[int, int]]
"""Heads and width, by name, of keys and values that decoding keeps and rules can round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Configures causal grouped-query self-attention (`jaxlm.models.mixers.attention`)."""

  N: int = 4
  """query heads"""
  K: int = 4
  """key and value heads; N / K query heads share one"""
  H: int = 32
  """width of one head (N * H may differ from D); even under rotary embedding"""
  window: int | None = None
  """keys that a query sees, itself included; None: all up to itself"""
  rope: RopeConfig | None = RopeConfig()
  """rotary position embedding; None: no positions but those of the causal mask (NoPE)"""
  qk_norm: bool = False
  """norm queries and keys over H, with weights that all heads share, before the rotation"""
  qkv_bias: bool = False
  """biases on queries, keys and values"""
  out_bias: bool = False
  """bias on the output of attention"""
  query_width: float | None = None
  """attention divides q.k by the root of this; by default of H"""
  cap: float | None = None
  """soft cap c of attention's logits a before the mask, c tanh(a / c); None: not capped"""
  states: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    check_finite(self, "mixer.")
    for name in ("N", "K", "H"):
      check(getattr(self, name) >= 1, f"mixer.{name}", getattr(self, name), "must be at least 1")
    rule = f"query heads must be a multiple of K={self.K} key heads"
    check(self.N % self.K == 0, "mixer.N", self.N, rule)
    rule = "rotary embedding needs an even head width"
    check(self.rope is None or self.H % 2 == 0, "mixer.H", self.H, rule)
    for name in ("window", "query_width", "cap"):
      value = getattr(self, name)
      check(value is None or value > 0, f"mixer.{name}", value, "must be above 0, or None")

  @property
  def cached(self) -> Heads:
    """Returns the keys and values of a position that decoding keeps.

    Keys that are rotated when they are read, under dynamic scaling, are left out: they cannot be
    rounded as they are used.
    """
    dynamic = self.rope is not None and self.rope.scaling == "dynamic"
    return ({} if dynamic else {"keys": (self.K, self.H)}) | {"values": (self.K, self.H)}


class Recurrence(NamedTuple):
  """Says what one of the recurrences of KdaConfig does."""

  decay: Literal["channel", "head", "fixed", "none"]
  """of the state: for each channel of a key, for each head, at a fixed rate of the head, or none"""
  erases: bool
  """whether a token erases what the state holds for its key, and writes as strongly"""
  features: Literal["unit", "positive", "plain"]
  """of queries and keys: of unit length, positive by elu + 1, or as they are"""


_RECURRENCES = {
  "kda": Recurrence("channel", True, "unit"),
  "gated_delta": Recurrence("head", True, "unit"),
  "delta": Recurrence("none", True, "unit"),
  "gla": Recurrence("channel", False, "unit"),
  "lightning": Recurrence("fixed", False, "plain"),
  "linear": Recurrence("none", False, "positive"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KdaConfig:
  """Configures Kimi delta attention and its special cases (`jaxlm.models.mixers.kda`)."""

  rule: Literal["kda", "gated_delta", "delta", "gla", "lightning", "linear"] = "kda"
  """the recurrence: kda decays every channel of a key and erases before it writes, gated_delta
  decays whole heads, delta nothing; gla is kda without erasing, lightning decays each head at a
  fixed rate and erases nothing, linear does neither"""
  N: int = 4
  """heads of values, states and gates"""
  K: int = 4
  """heads of queries and keys; N / K value heads share one"""
  H: int = 32
  """width of queries and keys of a head"""
  U: int | None = None
  """width of values of a head; by default H"""
  conv: int = 4
  """taps of the short convolutions on queries, keys and values; 0: none"""
  gate_rank: int | None = None
  """width of the bottlenecks of decay and output gate; by default U"""
  out_gate: Literal["sigmoid", "silu", "none"] = "sigmoid"
  """gate on the normed output of a head"""
  decay_bound: float | None = None
  """lower bound of a token's log decay, from -5 to below 0, reached by a sigmoid (Kimi's bounded
  gate); None: softplus, without a bound"""
  negative_eigenvalues: bool = False
  """erase and write with a strength of up to 2 instead of 1"""
  cached: ClassVar[Heads] = {}
  states: ClassVar[tuple[str, ...]] = ("state", "inputs")
  """what decoding keeps instead of keys and values, as large for any number of positions"""

  def __post_init__(self) -> None:
    check_finite(self, "mixer.")
    for name in ("N", "K", "H", "value_width", "bottleneck"):
      check(getattr(self, name) >= 1, f"mixer.{name}", getattr(self, name), "must be at least 1")
    rule = f"value heads must be a multiple of K={self.K} key heads"
    check(self.N % self.K == 0, "mixer.N", self.N, rule)
    check(self.H <= 256, "mixer.H", self.H, "must be at most 256")
    good = self.conv == 0 or self.conv >= 2
    check(good, "mixer.conv", self.conv, "must be at least 2 taps, or 0 for none")
    bound = self.decay_bound
    if bound is not None:
      check(-5 <= bound < 0, "mixer.decay_bound", bound, "must lie in [-5, 0), or be None")
      gated = self.recurrence.decay in ("channel", "head")
      check(gated, "mixer.decay_bound", bound, f"rule={self.rule} has no gate to bound")
    rule = f"rule={self.rule} erases nothing"
    good = self.recurrence.erases or not self.negative_eigenvalues
    check(good, "mixer.negative_eigenvalues", self.negative_eigenvalues, rule)

  @property
  def recurrence(self) -> Recurrence:
    """Returns what the rule does."""
    return _RECURRENCES[self.rule]

  @property
  def value_width(self) -> int:
    """Returns the width of values of a head."""
    return self.H if self.U is None else self.U

  @property
  def bottleneck(self) -> int:
    """Returns the width of the bottlenecks of decay and output gate."""
    return self.value_width if self.gate_rank is None else self.gate_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaConfig:
  """Configures native sparse attention (`jaxlm.models.mixers.nsa`)."""

  N: int = 4
  """query heads"""
  K: int = 1
  """key and value heads; N / K query heads share one, and what it selects"""
  H: int = 32
  """width of queries and keys of a head"""
  U: int | None = None
  """width of values of a head; by default H"""
  length: int = 32
  """tokens that are compressed into one key and value"""
  stride: int = 16
  """tokens from the start of one compressed block to the next"""
  block: int = 64
  """tokens of a block that is selected whole"""
  count: int = 16
  """blocks that a query selects, the first and its own two included"""
  window: int = 512
  """last keys that every query sees, itself included"""
  compression: Literal["mlp", "linear", "mean"] = "mlp"
  """how a block becomes one key and one value"""
  shared: bool = False
  """one set of keys and values serves the three branches, in place of one each"""
  gate_hidden: int | None = None
  """hidden width of the MLP that makes the gates, as in the paper; None: one product, as in public
  implementations"""
  rope: RopeConfig | None = RopeConfig()
  """rotary position embedding; a compressed key has the position of its first token; None: none"""
  states: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    check_finite(self, "mixer.")
    names = ("N", "K", "H", "value_width", "length", "stride", "block", "count", "window")
    for name in names:
      check(getattr(self, name) >= 1, f"mixer.{name}", getattr(self, name), "must be at least 1")
    good = self.gate_hidden is None or self.gate_hidden >= 1
    check(good, "mixer.gate_hidden", self.gate_hidden, "must be at least 1, or be None")
    rule = f"query heads must be a multiple of K={self.K} key heads"
    check(self.N % self.K == 0, "mixer.N", self.N, rule)
    rule = "rotary embedding needs an even head width"
    check(self.rope is None or self.H % 2 == 0, "mixer.H", self.H, rule)
    for name in ("length", "block"):
      size, rule = getattr(self, name), f"must be a multiple of stride={self.stride}"
      check(size % self.stride == 0, f"mixer.{name}", size, rule)
    rule = f"must be at most block={self.block}"
    check(self.length <= self.block, "mixer.length", self.length, rule)
    scaling = self.rope and self.rope.scaling
    rule = "native sparse attention caches rotated keys, which dynamic scaling would change"
    check(scaling != "dynamic", "mixer.rope.scaling", scaling, rule)

  @property
  def value_width(self) -> int:
    """Returns the width of values of a head."""
    return self.H if self.U is None else self.U

  @property
  def cached(self) -> Heads:
    """Returns the keys and values of a compressed block, and of a position, that decoding keeps."""
    widths = {"keys": self.H, "values": self.value_width}
    branches = ("compressed", "selected", "window")
    return {f"{b}.{part}": (self.K, width) for b in branches for part, width in widths.items()}

  @property
  def compression_shapes(self) -> dict[str, tuple[int, int, int]]:
    """Returns the shapes of the parameters that compress blocks of keys and values, by name."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for name, width in (("k", self.H), ("v", self.value_width)):
      if self.compression == "mean":
        continue
      shapes[f"{name}_position"] = (self.K, self.length, width)
      shapes[f"{name}_up"] = (self.K, self.length * width, width)
      if self.compression == "mlp":
        shapes[f"{name}_down"] = (self.K, width, width)
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
  """Configures a gated short convolution (`jaxlm.models.mixers.conv`)."""

  taps: int = 3
  """tokens that a channel sees, itself included"""
  cached: ClassVar[Heads] = {}
  states: ClassVar[tuple[str, ...]] = ("inputs",)

  def __post_init__(self) -> None:
    check(self.taps >= 2, "mixer.taps", self.taps, "must be at least 2")


MixerConfig = AttentionConfig | KdaConfig | NsaConfig | ConvConfig
