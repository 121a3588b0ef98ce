"""Records a configuration's shapes for `sharding.plan`, and sizes a batch for many devices."""

# D model, N query heads, K key heads, H head width, F feed-forward

from __future__ import annotations

import dataclasses
import itertools

from jaxlm.config import AttentionConfig, LayerSpec, ModelConfig, TrainConfig
from jaxlm.scaling.flops import matrix_entries, parameter_count, vector_entries
from pallas_kernels.common.errors import UnsupportedError
from sharding.plan import LayerShapes, ModelShapes, Step


def model_shapes(config: ModelConfig, name: str) -> ModelShapes:
  """Returns the shapes of a model; UnsupportedError names a layer that a plan does not know."""
  runs = itertools.groupby(config.layer_specs)
  layers = tuple((_layer_shapes(config, spec), len(tuple(run))) for spec, run in runs)
  return ModelShapes(name=name, D=config.D, V=config.V, layers=layers, tied=config.tied)


def _layer_shapes(config: ModelConfig, spec: LayerSpec) -> LayerShapes:
  mixer, feedforward = spec.mixer, spec.feedforward
  if not isinstance(mixer, AttentionConfig):
    raise UnsupportedError(f"model: a plan knows no {type(mixer).__name__}, only AttentionConfig")
  mlp = 3 * config.D * feedforward.F
  return LayerShapes(
    attention_weights=matrix_entries(config, spec) - mlp,
    N=mixer.N,
    K=mixer.K,
    H=mixer.H,
    U=mixer.H,
    mlp_weights=mlp,
    F=feedforward.F,
    window=mixer.window,
    vectors=vector_entries(config, spec),
  )


def step_shapes(config: TrainConfig) -> Step:
  """Returns the shapes of a training step."""
  wide, bits = {"float32": 4, "bfloat16": 2}, config.compute
  schedule = config.pipeline.schedule
  chunks = {"zb_v": 2, "dualpipev": 2, "interleaved": config.pipeline.stages_per_rank}
  return Step(
    batch=config.batch,
    length=config.data.length,
    accumulate=config.accumulate,
    remat=bits.remat,
    compute_bytes=wide[bits.dtype],
    reduce_bytes=wide[bits.reduce_dtype],
    state_bytes=_state_bytes(config),
    schedule=schedule,
    chunks=chunks.get(schedule, 1),
  )


def _state_bytes(config: TrainConfig) -> float:
  """Returns the bytes of optimizer state and moving average for each weight, on average."""
  average = 4 if config.ema else 0
  if config.optimizer.name == "adafactor":  # rows and columns of second moments
    return average
  if config.optimizer.name == "adamw":
    return 8 + average
  specs = config.model.layer_specs
  matrices = sum(matrix_entries(config.model, spec) for spec in specs)  # one momentum
  return 8 - 4 * matrices / parameter_count(config.model).total + average


def with_rows_for(config: TrainConfig, devices: int) -> TrainConfig:
  """Returns the configuration with a row for each device, if its batch has fewer."""
  if config.batch >= devices:
    return config
  return dataclasses.replace(config, batch=devices, accumulate=1)
