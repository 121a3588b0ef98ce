"""Configures a run: frozen dataclasses and their checks, nothing else.

`TrainConfig` is the root and nests the others. Every field is a flag by its path
(`--model.layers 3`), the text under it is its help, and every error names the field, its value and
the rule. No jax here: `--help` stays fast.
"""

from jaxlm.config.checks import check, check_finite, check_seed
from jaxlm.config.compute import ComputeConfig
from jaxlm.config.data import DataConfig
from jaxlm.config.layers import decoder, rearrange, revise
from jaxlm.config.mixers import AttentionConfig, ConvConfig, KdaConfig, MixerConfig, NsaConfig
from jaxlm.config.model import LayerSpec, MlpConfig, ModelConfig
from jaxlm.config.nested import NestedConfig
from jaxlm.config.optimizer import OnNewSteps, OptimizerConfig
from jaxlm.config.pipeline import PipelineConfig
from jaxlm.config.quant import QuantRule, QuantSpec
from jaxlm.config.rope import RopeConfig
from jaxlm.config.train import TrainConfig
from sharding.mesh import MeshConfig

__all__ = [
  "AttentionConfig",
  "ComputeConfig",
  "ConvConfig",
  "DataConfig",
  "KdaConfig",
  "LayerSpec",
  "MeshConfig",
  "MixerConfig",
  "MlpConfig",
  "ModelConfig",
  "NestedConfig",
  "NsaConfig",
  "OnNewSteps",
  "OptimizerConfig",
  "PipelineConfig",
  "QuantRule",
  "QuantSpec",
  "RopeConfig",
  "TrainConfig",
  "check",
  "check_finite",
  "check_seed",
  "decoder",
  "rearrange",
  "revise",
]
