"""What a run is: frozen dataclasses and their checks, nothing else.

`TrainConfig` is the root and nests the others. Every field is a flag by its path
(`--model.layers 3`), the text under it is its help, and every error names the field, its value and
the rule. No jax here: `--help` stays fast.
"""

from jaxlm.config.checks import check, check_finite
from jaxlm.config.data import DataConfig
from jaxlm.config.model import ModelConfig, RopeConfig
from jaxlm.config.optimizer import OptimizerConfig
from jaxlm.config.train import TrainConfig
from sharding.mesh import MeshConfig

__all__ = [
  "DataConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "RopeConfig",
  "TrainConfig",
  "check",
  "check_finite",
]
