"""Training steps lowered from shapes alone, for the CPU devices here or for TPUs that are not."""

import dataclasses
import importlib.util

import jax
import pytest

from jaxlm.run.text import TextTask
from jaxlm.train.lowering import lower_step as lower_step_on
from sharding import make_mesh


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
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, layout="packed"))
    task = TextTask(config)
    devices = jax.devices() if devices is None else devices
    return lower_step_on(config, task, task.batch_types(), make_mesh(config.mesh, devices))

  return lower
