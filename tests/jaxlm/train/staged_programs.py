"""Compiles the step of each schedule on a mesh of all axes, and lists what it sends.

A process of its own, because tests have 8 devices and this takes 64. Nothing runs.
"""

import dataclasses
import json
import math
import typing

import jax

from jaxlm.config import DataConfig, MeshConfig, PipelineConfig, TrainConfig, decoder
from jaxlm.config.pipeline import PipelineSchedule
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from jaxlm.train.lowering import lower_step
from jaxlm.train.stages import make_schedule
from sharding import make_mesh
from sharding.collectives import read_collectives

SCHEDULES = typing.get_args(PipelineSchedule)
AXES = ("data", "fsdp", "context_ring", "context_ulysses", "tensor")
MESH = MeshConfig(stage=2, **dict.fromkeys(AXES, 2))
# no array but whole rows and whole vocabularies has an axis of these sizes
T, V = 32, 40


def config_of(schedule: str) -> TrainConfig:
  """Returns a run with one layer in each stage."""
  config = TrainConfig(
    batch=16,
    accumulate=4,
    data=DataConfig(length=T, layout="packed"),
    mesh=MESH,
    pipeline=PipelineConfig(schedule=schedule),
  )
  layers = make_schedule(config, MESH.stage).stages
  model = decoder(V=V, D=16, F=24, N=4, K=2, H=4, layers=layers)
  return dataclasses.replace(config, model=model)


def read_program(config: TrainConfig) -> dict[str, typing.Any]:
  """Returns the collectives of a compiled step, and what is known of its parameters."""
  task, mesh = TextTask(config), make_mesh(MESH)
  step = lower_step(config, task, task.batch_types(), mesh).compile()
  with jax.set_mesh(mesh):
    params = jax.tree.leaves(jax.eval_shape(lambda: init_state(config, task)).params)
  return {
    "collectives": [dataclasses.asdict(c) for c in read_collectives(step.as_text(), MESH.sizes())],
    "local_sizes": [math.prod(w.sharding.shard_shape(w.shape)) for w in params],
    "over_fsdp": sum("fsdp" in str(w.sharding.spec) for w in params),
  }


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", math.prod(MESH.sizes().values()))
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_enable_compilation_cache", False)
  print(json.dumps({name: read_program(config_of(name)) for name in SCHEDULES}))
