"""Configures a whole run: the root that nests the other configurations."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxlm.config.checks import check, check_finite, check_seed
from jaxlm.config.compute import ComputeConfig
from jaxlm.config.data import DataConfig
from jaxlm.config.model import ModelConfig
from jaxlm.config.nested import NestedConfig
from jaxlm.config.optimizer import OptimizerConfig
from jaxlm.config.pipeline import PipelineConfig
from sharding.mesh import MeshConfig

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Configures a whole run: written to its folder as config.json, and enough to repeat it.

  `model`, `compute`, `data`, `init`, `z_loss`, `loss_implementation` and `nested` belong to text;
  other tasks of `jaxlm.run.fit` leave them alone.
  """

  steps: int = 400
  """optimizer steps"""
  batch: int = 16
  """sequences per step, over all devices"""
  accumulate: int = 1
  """micro-batches that a step's batch is split into"""
  seed: int = 0
  """of the weights and the data order"""
  init: str = ""
  """Hugging Face checkpoint to start from, and its tokenizer: folder or hf:owner/name (extra hf)"""
  ignore_config: tuple[str, ...] = ()
  """fields of the config.json of `init` that are read as if they were not there"""
  ignore_tensors: tuple[str, ...] = ()
  """tensors of `init` that are no weights of the model: names, or patterns with * and ?"""
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
  """a loss or gradient that is not finite: stop and keep the batch, or leave out that update"""
  spike: Literal["report", "skip", "stop"] = "report"
  """a loss that jumps above the last 64: print it, leave out the update, or stop, keep the batch"""
  spike_size: float = 10.0
  """a jump: median + this many median absolute deviations (of at least 1 % of the median)"""
  log_every: int = 10
  """steps between printed lines where there is no terminal for the live display"""
  stop_after: str = ""
  """time after which to save and stop, to be resumed later: 90s, 30m, 2h, 1d; empty: no limit"""
  z_loss: float = 0.0
  """times the mean squared log of the softmax normaliser"""
  loss_implementation: Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"] = "auto"
  """of `pallas_kernels.linear_cross_entropy`; auto: by chip, vocabulary; reference: all logits"""
  ema: float = 0.0
  """decay of an exponential moving average of the weights; 0: none"""
  trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
  """send metrics there too (extras of the same name)"""
  keep_freed_memory: bool = True
  """on CPU under Linux: let malloc keep what a step frees (faster, about 1.5x the memory)"""
  model: ModelConfig = ModelConfig()
  compute: ComputeConfig = ComputeConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  pipeline: PipelineConfig = PipelineConfig()
  nested: NestedConfig = NestedConfig()

  def __post_init__(self) -> None:
    check_finite(self, "")
    for name in ("steps", "batch", "accumulate", "keep", "eval_batches", "log_every"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    for name in ("save_every", "keep_every", "eval_every", "z_loss"):
      check(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
    check_seed(self.seed)
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
    """Returns `stop_after` in seconds; infinite where it is empty."""
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
