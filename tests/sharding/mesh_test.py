import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import MeshConfig, make_mesh

NAMES = ("data", "stage", "fsdp", "context_ring", "context_ulysses", "expert", "tensor")


def test_mesh_keeps_axes_of_size_one_in_order_and_makes_all_explicit():
  mesh = make_mesh(MeshConfig(data=2, tensor=4))
  assert dict(mesh.shape) == dict(zip(NAMES, (2, 1, 1, 1, 1, 1, 4)))
  assert mesh.axis_names == NAMES
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_default_mesh_is_data_parallel_over_all_devices():
  assert make_mesh().shape["data"] == jax.device_count() == 8


def test_a_smaller_mesh_takes_the_first_devices():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2))
  assert list(mesh.devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize("size", [0, -2])
def test_an_axis_without_devices_is_refused_by_name(size):
  with pytest.raises(ValueError, match=rf"mesh\.tensor={size}: .*at least 1"):
    MeshConfig(tensor=size)


def test_only_one_axis_may_take_the_rest():
  with pytest.raises(ValueError, match=r"mesh\.fsdp=-1: only one axis.*mesh\.data"):
    MeshConfig(fsdp=-1)


def test_a_rest_that_does_not_divide_is_refused_with_both_numbers():
  with pytest.raises(ValueError, match="tensor 3: 8 devices cannot be split into groups of 3"):
    make_mesh(MeshConfig(tensor=3))


def test_too_many_devices_are_refused_with_both_numbers():
  with pytest.raises(ValueError, match="data 4 x fsdp 4: needs 16 devices, there are 8"):
    make_mesh(MeshConfig(data=4, fsdp=4))


@given(st.lists(st.integers(1, 4), min_size=7, max_size=7), st.integers(0, 6), st.integers(1, 64))
def test_the_free_axis_takes_exactly_what_is_left(sizes, free, devices):
  written = dict(zip(NAMES, sizes)) | {NAMES[free]: -1}
  config = MeshConfig(**({"data": 1} | written))
  fixed = math.prod(size for size in written.values() if size != -1)
  if devices % fixed:
    with pytest.raises(
      ValueError, match=f"{devices} devices cannot be split into groups of {fixed}"
    ):
      config.resolve(devices)
  else:
    resolved = config.resolve(devices)
    assert math.prod(resolved.values()) == devices
    assert {name: size for name, size in resolved.items() if name != NAMES[free]} == {
      name: size for name, size in written.items() if size != -1
    }


def test_programs_of_several_cpu_devices_stay_out_of_the_compilation_cache():
  """From the cache they would hang."""
  before = jax.config.jax_enable_compilation_cache
  try:
    jax.config.update("jax_enable_compilation_cache", True)
    make_mesh(MeshConfig(data=1))
    assert jax.config.jax_enable_compilation_cache
    make_mesh(MeshConfig(data=2))
    assert not jax.config.jax_enable_compilation_cache
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
