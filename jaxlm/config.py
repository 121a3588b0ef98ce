"""What a run is: frozen dataclasses and their checks, nothing else.

`TrainConfig` is the root and nests the others. Every field is a flag by its path (`--model.layers 3`), the text
under it is its help, and every error names the field, its value and the rule. No jax here: `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from sharding.mesh import MeshConfig

__all__ = [
  "DataConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "RopeConfig",
  "TrainConfig",
]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def check(good: bool, field: str, value: Any, rule: str) -> None:
  """Raises ValueError "field=value: rule" unless `good`."""
  if not good:
    raise ValueError(f"{field}={value!r}: {rule}")


def check_finite(config: Any, path: str) -> None:
  """Raises ValueError for a number among the fields that is not one, or is infinite."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    check(
      not isinstance(value, float) or math.isfinite(value),
      path + field.name,
      value,
      "must be a finite number",
    )


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where text comes from and how it becomes rows of tokens."""

  source: str = "stdlib"
  """a file or folder (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), hf:owner/dataset, or stdlib (Python's own)"""
  tokenizer: str = "bytes"
  """bytes, a Hugging Face tokenizer.json, or bpe:SIZE to train one on the corpus"""
  length: int = 256
  """T, predicted tokens per row"""
  layout: Literal["windows", "packed"] = "windows"
  """windows: cuts of the joined text; packed: whole documents side by side, attention and positions kept apart"""
  holdout: float = 0.03
  """fraction of the documents kept for evaluation, chosen by a hash of their names"""
  text_field: str = "text"
  """the field of jsonl, parquet and hf records that holds the text"""
  max_bytes: int = 2**30
  """read at most this much text"""
  invalid_utf8: Literal["error", "replace"] = "error"
  """what to do with bytes that are not UTF-8; replaced ones are counted in the log"""
  threads: int = 2
  """reader threads"""

  def __post_init__(self) -> None:
    check_finite(self, "data.")
    check(self.length >= 1, "data.length", self.length, "must be at least 1")
    check(0 < self.holdout < 1, "data.holdout", self.holdout, "must lie between 0 and 1")
    check(self.max_bytes >= 1, "data.max_bytes", self.max_bytes, "must be at least 1")
    check(self.threads >= 1, "data.threads", self.threads, "must be at least 1")
    if self.tokenizer.startswith("bpe:"):
      size = self.tokenizer.removeprefix("bpe:")
      good = size.isascii() and size.isdigit() and int(size) >= 257
      check(good, "data.tokenizer", self.tokenizer, "bpe:SIZE needs a whole number of at least 257")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Update rule, learning-rate schedule, clipping."""

  name: Literal["adamw", "muon", "adafactor"] = "adamw"
  """adamw; muon (orthogonalised momentum for the matrices of the blocks, adamw for the rest); adafactor"""
  learning_rate: float = 1e-3
  """peak"""
  schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
  """after the warm-up: cosine, warm-up-stable-decay, linear, constant"""
  warmup: int = 100
  """steps of linear warm-up from 0"""
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
    check(self.warmup >= 0, "optimizer.warmup", self.warmup, "must be at least 0")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A whole run: written to its folder as config.json, and enough to repeat it."""

  steps: int = 400
  """optimizer steps"""
  batch: int = 16
  """sequences per step, over all devices"""
  accumulate: int = 1
  """micro-batches that a step's batch is split into"""
  seed: int = 0
  """of the weights and the data order"""
  init: str = ""
  """Hugging Face checkpoint to start from, a folder or owner/name (extra hf): its weights, model and tokenizer.json"""
  run: str = ""
  """folder of the run; must be new or empty (default: runs/PRESET)"""
  save_every: int = 100
  """steps between checkpoints; 0 saves only at the end"""
  keep: int = 2
  """newest checkpoints to keep"""
  keep_every: int = 0
  """besides, keep every checkpoint whose step is a multiple of this; 0: none"""
  eval_every: int = 100
  """steps between evaluations on held-out text; 0 evaluates only at the end"""
  eval_batches: int = 8
  """batches of each evaluation (`jaxlm eval` reads all)"""
  nonfinite: Literal["stop", "skip"] = "stop"
  """a loss or gradient that is not finite: stop the run and keep the batch, or leave out that update and count it"""
  spike: Literal["report", "skip", "stop"] = "report"
  """a loss that jumps above the last 64: say so, leave out its update, or stop and keep the batch"""
  spike_size: float = 10.0
  """what counts as a jump: median + this many median absolute deviations (of at least 1 % of the median)"""
  log_every: int = 10
  """steps between printed lines where there is no terminal for the live display"""
  stop_after: str = ""
  """time after which this process saves and leaves, to be resumed: 90s, 30m, 2h, 1d; empty: no limit"""
  z_loss: float = 0.0
  """times the mean squared log of the softmax normaliser"""
  loss_implementation: Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"] = "auto"
  """of `pallas_kernels.linear_cross_entropy`; auto: by chip and vocabulary; reference holds all logits in memory"""
  ema: float = 0.0
  """decay of an exponential moving average of the weights; 0: none"""
  trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
  """send metrics there too (extras of the same name)"""
  keep_freed_memory: bool = True
  """on CPU under Linux: let malloc keep what a step frees (faster, about 1.5x the memory)"""
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self) -> None:
    check_finite(self, "")
    for name in ("steps", "batch", "accumulate", "keep", "eval_batches", "log_every"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    for name in ("save_every", "keep_every", "eval_every", "z_loss", "seed"):
      check(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
    check(
      self.batch % self.accumulate == 0,
      "batch",
      self.batch,
      f"must be a multiple of accumulate={self.accumulate}",
    )
    check(self.spike_size > 0, "spike_size", self.spike_size, "must be above 0")
    check(0 <= self.ema < 1, "ema", self.ema, "must lie in [0, 1)")
    check(self.stop_seconds > 0, "stop_after", self.stop_after, "must be above 0")

  @property
  def stop_seconds(self) -> float:
    """`stop_after` in seconds; infinite where it is empty."""
    if not self.stop_after:
      return math.inf
    number, unit = self.stop_after[:-1], self.stop_after[-1]
    rule = "must be a number with its unit, as in 90s, 30m, 2h or 1d"
    check(
      number.replace(".", "", 1).isdecimal() and unit in _SECONDS,
      "stop_after",
      self.stop_after,
      rule,
    )
    return float(number) * _SECONDS[unit]
