"""Compiles the training step of a configuration for TPUs that are not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxlm.config import MeshConfig, TrainConfig
from jaxlm.run.resolve import check_mesh
from jaxlm.run.text import TextTask
from jaxlm.scaling.shapes import model_shapes, step_shapes, with_rows_for
from jaxlm.train.lowering import lower_step
from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import parse_topology
from sharding.aot import Program, compile_for
from sharding.plan import best_plans


def compile_ahead(config: TrainConfig, topology: str) -> Program:
  """Compiles the step that `jaxlm.run.train` would run on the topology, and reads the program.

  Raises UserError for an unknown topology, a mesh that does not fit it or the model, and a step
  that needs more memory than there is; MissingExtraError without libtpu.
  """
  devices = parse_topology(topology).devices
  check_mesh(config, devices)
  task = TextTask(config)
  return compile_for(
    topology, config.mesh, lambda mesh: lower_step(config, task, task.batch_types(), mesh)
  )


def runnable(config: TrainConfig, topology: str) -> TrainConfig:
  """Returns the configuration with rows for all devices and, unless it names one, a mesh.

  The mesh is the best of `sharding.plan` that the model can run on; those with a ring or stages
  come last, as attention has no fused kernel there. Raises UserError where there is none.
  """
  target = parse_topology(topology)
  if config.mesh != MeshConfig():
    return config
  config = with_rows_for(config, target.devices)
  model = model_shapes(config.model, "model")
  plans = best_plans(model, step_shapes(config), target)
  for plan in sorted(plans, key=lambda plan: not plan.fits or not _fuses_attention(plan.sizes)):
    planned = dataclasses.replace(config, mesh=MeshConfig(**plan.sizes))
    try:
      check_mesh(planned, target.devices)
    except UserError:
      continue
    return planned
  raise UserError(
    f"topology={topology!r}: the model can run on no mesh of {target.devices} devices"
  )


def _fuses_attention(sizes: Mapping[str, int]) -> bool:
  return sizes["context_ring"] == sizes["stage"] == 1
