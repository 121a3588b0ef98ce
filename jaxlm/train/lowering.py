"""Lowers the training step from shapes alone, for devices that are here or not."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import TrainConfig
from jaxlm.train.state import init_state
from jaxlm.train.step import make_train_step
from jaxlm.train.task import Task
from sharding.rules import spec


def lower_step(config: TrainConfig, task: Task, batch: Any, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the step that `jaxlm.run.fit` compiles, on `mesh`; nothing is computed.

  `batch` has the shapes and dtypes of the global batch, rows first. Implementations are those that
  the platform of `mesh` takes. Raises UserError where the model does not divide over the mesh.
  """

  def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
    partitions = P() if x.sharding is None else x.sharding.spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partitions))

  def by_rows(x: Any) -> jax.ShapeDtypeStruct:
    partitions = spec(x.shape, "batch", *[None] * (len(x.shape) - 1))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partitions))

  with jax.set_mesh(mesh):
    state = jax.tree.map(on_mesh, jax.eval_shape(lambda: init_state(config, task)))
    train_step = jax.jit(make_train_step(config, task), donate_argnums=0)
    return train_step.lower(state, jax.tree.map(by_rows, batch), math.inf)
