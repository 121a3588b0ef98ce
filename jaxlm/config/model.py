"""What a model is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding and its context extensions (frequencies: `jaxlm.models.rope`)."""

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
    check_finite(self, "model.rope.")
    check(self.theta > 1, "model.rope.theta", self.theta, "must be above 1")
    check(self.factor >= 1, "model.rope.factor", self.factor, "must be at least 1")
    check(
      self.original_length >= 1,
      "model.rope.original_length",
      self.original_length,
      "must be at least 1",
    )
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
      unused = self.scaling == "yarn" or getattr(self, name) is None
      check(
        unused,
        f"model.rope.{name}",
        getattr(self, name),
        f"belongs to yarn, not to scaling={self.scaling}",
      )
    check(
      self.low_freq_factor < self.high_freq_factor,
      "model.rope.low_freq_factor",
      self.low_freq_factor,
      f"must be below high_freq_factor={self.high_freq_factor}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder: embed, blocks of attention and feed-forward, norm, head."""

  D: int = 128
  """width of the residual stream"""
  F: int = 352
  """feed-forward width"""
  N: int = 4
  """query heads"""
  K: int = 4
  """key and value heads; N / K query heads share one"""
  H: int = 32
  """width of one head (N * H may differ from D); even, for rotary embedding"""
  V: int = 256
  """vocabulary size; train raises it to the tokenizer's where that has more"""
  layers: int = 4
  """number of blocks"""
  attention: tuple[Literal["full", "window"], ...] = ("full",)
  """kind of attention per layer, repeated over the depth: ("window", "full") alternates"""
  window: int = 128
  """keys that a query of a "window" layer sees, itself included"""
  rope: RopeConfig = RopeConfig()
  max_length: int | None = None
  """longest context that published weights are meant for; kept for other tools, nothing here depends on it"""
  tied: bool = False
  """the head is the transposed embedding"""
  embed_scale: Literal["one", "root_width"] = "one"
  """factor on the embedding at the input: 1, or the root of D rounded to the compute type"""
  norm_eps: float = 1e-6
  """added to the mean square in RMSNorm"""
  norm_offset: Literal[0, 1] = 0
  """norms multiply by this plus their weight, and the weight starts at 1 minus this"""
  post_norms: bool = False
  """besides its input, norm the output of attention and feed-forward before it joins the residual stream"""
  qk_norm: bool = False
  """norm queries and keys over H, with weights that all heads share, before the rotation"""
  qkv_bias: bool = False
  """biases on queries, keys and values"""
  out_bias: bool = False
  """bias on the output of attention"""
  mlp_bias: bool = False
  """biases in the feed-forward: gate, up and down"""
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  """of the feed-forward's gate; gelu exactly, or in its tanh approximation"""
  query_width: float | None = None
  """attention divides q.k by the root of this; by default of H"""
  attention_cap: float | None = None
  """soft cap c of attention's logits a before the mask, c tanh(a / c); None: not capped"""
  logit_cap: float | None = None
  """soft cap of the model's logits, likewise"""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """compute type; weights stay float32, and norms, softmax and losses are computed in float32"""
  attention_implementation: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
  """auto: splash on TPU, cudnn on GPU, blocked elsewhere; a named one runs or raises"""
  remat: Literal["none", "full", "dots", "names"] = "none"
  """what the backward pass recomputes: nothing, each block, all but matmul outputs, all but the named activations"""
  scan: Literal["auto", "always", "never"] = "auto"
  """run the blocks by lax.scan; auto: not on CPU up to 8 layers, where a Python loop is faster"""

  def __post_init__(self) -> None:
    check_finite(self, "model.")
    for name in ("D", "F", "N", "K", "H", "V", "layers", "window"):
      check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
    check(
      self.N % self.K == 0,
      "model.N",
      self.N,
      f"query heads must be a multiple of K={self.K} key heads",
    )
    check(self.H % 2 == 0, "model.H", self.H, "rotary embedding needs an even head width")
    check(len(self.attention) > 0, "model.attention", self.attention, "names at least one kind")
    check(
      self.layers % len(self.attention) == 0,
      "model.layers",
      self.layers,
      f"must be a multiple of the {len(self.attention)} entries of model.attention={self.attention}",
    )
    check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be above 0")
    check(self.norm_offset in (0, 1), "model.norm_offset", self.norm_offset, "must be 0 or 1")
    for name in ("max_length", "query_width", "attention_cap", "logit_cap"):
      value = getattr(self, name)
      check(value is None or value > 0, f"model.{name}", value, "must be above 0, or None")
