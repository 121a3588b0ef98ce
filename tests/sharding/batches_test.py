"""Which rows of a batch a process loads, on device orders that jax chooses for real machines."""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data.loader import load_text, train_loader
from sharding import MeshConfig, make_mesh
from sharding.batches import globalize, local_rows, rows_of_process


@dataclasses.dataclass(frozen=True)
class MockDevice:
  """What jax's choice of a device order looks at."""

  id: int
  process_index: int
  coords: tuple[int, int, int]
  device_kind: str
  platform: str = "tpu"
  core_on_chip: int = 0
  slice_index: int = 0


def mock_slice(kind: str, shape: tuple[int, int, int]) -> list[MockDevice]:
  """The devices of a slice whose hosts own 2 x 2 chips each, in the order of `jax.devices()`."""
  hosts = list(itertools.product(range(shape[2]), range(shape[1] // 2), range(shape[0] // 2)))
  devices = []
  for process, (z, y, x) in enumerate(hosts):
    for dy, dx in itertools.product(range(2), range(2)):
      coords = (2 * x + dx, 2 * y + dy, z)
      devices.append(MockDevice(len(devices), process, coords, kind))
  return devices


SLICES = {
  "v5e 4x4": ("TPU v5 lite", (4, 4, 1)),
  "v6e 4x4": ("TPU v6 lite", (4, 4, 1)),
  "v4 2x2x2": ("TPU v4", (2, 2, 2)),
  "v5p 2x2x4": ("TPU v5", (2, 2, 4)),
}
MESHES = [
  MeshConfig(),
  MeshConfig(tensor=2),
  MeshConfig(tensor=4),
  MeshConfig(data=2, fsdp=-1),
  MeshConfig(data=1, fsdp=-1, tensor=2),
]
BATCH = 32


@pytest.mark.parametrize("config", MESHES, ids=lambda config: config.describe())
@pytest.mark.parametrize("name", SLICES)
def test_every_process_loads_the_rows_that_its_devices_hold(name, config):
  devices = mock_slice(*SLICES[name])
  mesh = make_mesh(config, devices)
  processes = range(1 + max(device.process_index for device in devices))
  rows_of = [rows_of_process(mesh, BATCH, process) for process in processes]

  # The same from the place of each device in the mesh: tensor is its last axis, and splits no rows.
  groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
  rows_per_group = BATCH // len(groups)
  for process, rows in enumerate(rows_of):
    held = [any(device.process_index == process for device in group) for group in groups]
    np.testing.assert_array_equal(rows, np.flatnonzero(np.repeat(held, rows_per_group)))
  np.testing.assert_array_equal(np.unique(np.concatenate(rows_of)), np.arange(BATCH))


@pytest.mark.parametrize("name", SLICES)
def test_jax_visits_hosts_more_than_once(name):
  """So the test above is about rows that are not contiguous."""
  mesh = make_mesh(MeshConfig(), mock_slice(*SLICES[name]))
  assert any((np.diff(rows_of_process(mesh, BATCH, process)) > 1).any() for process in range(2))


@pytest.mark.parametrize("name", SLICES)
def test_the_batch_is_the_same_whatever_the_number_of_processes(name, tmp_path):
  for index in range(9):
    (tmp_path / f"{index}.txt").write_text(f"document {index} " * 40)
  text = load_text(DataConfig(source=str(tmp_path), length=16))
  mesh = make_mesh(MeshConfig(), mock_slice(*SLICES[name]))
  whole = next(train_loader(text, batch=BATCH, seed=3))
  together = np.zeros_like(whole.inputs_BT)
  for process in range(1 + max(device.process_index for device in mesh.devices.flat)):
    rows = rows_of_process(mesh, BATCH, process)
    together[rows] = next(train_loader(text, batch=BATCH, seed=3, rows=rows)).inputs_BT
  np.testing.assert_array_equal(together, whole.inputs_BT)


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_global_arrays_hold_the_rows_in_order_on_any_order_of_devices(config):
  devices = jax.devices()
  mesh = make_mesh(config, devices[::2] + devices[1::2])
  local = {"x_BT": np.arange(BATCH * 3).reshape(BATCH, 3), "w_B": np.arange(BATCH)}
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(local_rows(BATCH), np.arange(BATCH))
    whole = globalize(local, BATCH)
  chex.assert_trees_all_equal(jax.device_get(whole), local)
  for shard in whole["x_BT"].addressable_shards:
    np.testing.assert_array_equal(shard.data, local["x_BT"][shard.index])


def test_a_mesh_that_leaves_a_process_without_devices_is_refused():
  devices = mock_slice(*SLICES["v5e 4x4"])
  with pytest.raises(ValueError, match=r"data 4: uses 4 of 16 devices.*processes \[1, 2, 3\]"):
    make_mesh(MeshConfig(data=4), devices)
