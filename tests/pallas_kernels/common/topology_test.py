"""Names of chips in their network: what they stand for, and which are refused, in one line each."""

import pytest

from pallas_kernels.common.chips import CHIPS
from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.common.topology import parse_topology, topology_devices


@pytest.mark.parametrize(
  "name, chips, devices, wraps",
  [
    ("v5p:8x8x8", 512, 512, [True, True, True]),
    ("v5p:2x2x4", 16, 16, [False, False, True]),
    ("v5e:16x8", 128, 128, [True, False]),
    ("v6e:1x1", 1, 1, [False, False]),
    ("tpu7x:4x4x4", 64, 128, [True, True, True]),
    ("h100-sxm:64", 64, 64, [False]),
  ],
)
def test_chips_devices_and_rings(name, chips, devices, wraps):
  topology = parse_topology(name)
  assert (topology.chips, topology.devices) == (chips, devices)
  assert [topology.wraps(axis) for axis in range(len(topology.shape))] == wraps


@pytest.mark.parametrize(
  "name, rule",
  [
    ("v9:2x2", "there is no chip 'v9' with a known network; chips: v3, v4, v5e"),
    ("l4:2", "there is no chip 'l4' with a known network"),
    ("v5p", "must be CHIP:SHAPE"),
    ("v5p:4x0x4", "must be CHIP:SHAPE"),
    ("v5p:4x4", "v5p has 3 axes, this shape has 2"),
    ("h100-sxm:8x8", "must be h100-sxm:COUNT, this shape has 2"),
    ("v5p:3x4x4", "a host has 2x2 chips, which must divide the first two axes"),
    ("v5e:32x16", "has 512 chips, a pod of v5e has 256"),
    ("b200:12", "a node has 8, which must divide a number above it"),
  ],
)
def test_what_is_refused(name, rule):
  with pytest.raises(UserError, match=rule) as raised:
    parse_topology(name)
  assert str(raised.value).startswith(f"topology={name!r}: ") and "\n" not in str(raised.value)


def test_gpus_are_planned_but_not_compiled_for():
  with pytest.raises(UnsupportedError, match="only TPU programs compile without the device"):
    topology_devices("h100-sxm:8")


@pytest.mark.parametrize("name", ["v3", "v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_devices_of_a_tpu_are_those_that_the_table_counts(name):
  pytest.importorskip("libtpu")
  chip = CHIPS[name]
  shape = "2x2" if chip.torus_axes == 2 else "2x2x1"
  devices = topology_devices(f"{name}:{shape}")
  assert len(devices) == 4 * chip.devices_per_chip
  assert {device.device_kind for device in devices} <= set(chip.device_kinds)


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_links_reach_about_nine_tenths_of_the_nominal_interconnect(name):
  chip = CHIPS[name]
  reached = 2 * chip.torus_axes * chip.link_bytes_per_s
  assert 0.89 <= reached / chip.interconnect_bytes_per_s <= 1
