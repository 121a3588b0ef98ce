"""Training steps lowered from shapes alone, for the CPU devices here or for TPUs that are not."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.data.packing import Batch
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from sharding.rules import spec


@pytest.fixture(scope="session")
def tpu_devices():
  """Eight TPU v5e chips of libtpu's compiler; nothing runs on them."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  from pallas_kernels.schedule.compiler import chip_mesh

  return chip_mesh("v5e", (8,)).devices.tolist()


@pytest.fixture(scope="session")
def lower_step():
  """Returns lower_step(config, devices=None): lowers the step on packed rows on `config.mesh`."""

  def lower(config, devices=None):
    sizes = config.mesh.resolve(8 if devices is None else len(devices))
    mesh = jax.make_mesh(
      tuple(sizes.values()), tuple(sizes), (AxisType.Explicit,) * len(sizes), devices=devices
    )

    def on_mesh(x):
      partitions = P() if x.sharding is None else x.sharding.spec
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partitions))

    with jax.set_mesh(mesh):
      state = jax.tree.map(on_mesh, jax.eval_shape(lambda: init_state(config, TextTask(config))))
      shape = (config.batch, config.data.length)
      rows = NamedSharding(mesh, spec(shape, "batch", None))
      ids, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (np.int32, np.float32)
      )
      batch = Batch(ids, ids, weights, ids, ids)
      return jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0).lower(
        state, batch
      )

  return lower
