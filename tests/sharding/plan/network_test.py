"""Mesh axes laid over a torus or nodes, and what collectives over them take."""

import pytest

from pallas_kernels.common.topology import parse_topology
from sharding import roofline
from sharding.hardware import CHIPS
from sharding.plan.network import Ring, place_axes

LINK = CHIPS["v5p"].link_bytes_per_s
V = 1e9


def torus(name, **sizes):
  return place_axes(sizes, parse_topology(name))


def test_an_axis_takes_whole_axes_of_the_torus_the_innermost_first():
  placed = torus("v5p:8x8x8", data=8, fsdp=8, tensor=8)
  assert placed.rings == {axis: (Ring(8, LINK, True),) for axis in ("data", "fsdp", "tensor")}
  placed = torus("v5p:8x8x8", fsdp=64, tensor=8)
  assert [len(placed.rings[axis]) for axis in ("fsdp", "tensor")] == [2, 1]


def test_parts_of_an_axis_have_no_ring_and_those_apart_share_links():
  placed = torus("v5p:8x8x8", fsdp=128, tensor=4)
  assert placed.rings["tensor"] == (Ring(4, LINK, False),)
  assert placed.rings["fsdp"] == (Ring(2, LINK / 4, True), Ring(8, LINK, True), Ring(8, LINK, True))


def test_the_devices_of_a_chip_are_a_row_of_their_own():
  placed = torus("tpu7x:4x4x4", fsdp=64, tensor=2)
  link = CHIPS["tpu7x"].link_bytes_per_s
  assert placed.rings["tensor"] == (Ring(2, link, False),)
  assert placed.rings["fsdp"] == (Ring(4, link, True),) * 3


def test_times_are_the_rooflines():
  rings = torus("v5p:8x8x8", fsdp=64, tensor=8)
  gather = roofline.all_gather_time(V, [8, 8], 2 * LINK)
  assert rings.seconds("all-gather", ("fsdp",), V) == pytest.approx(gather)
  assert rings.seconds("reduce-scatter", ("fsdp",), V) == pytest.approx(gather)
  assert rings.seconds("all-reduce", ("fsdp",), V) == pytest.approx(2 * gather)
  three = roofline.all_gather_time(V, [8, 8, 8], 2 * LINK)
  assert rings.seconds("all-gather", ("fsdp", "tensor"), V) == pytest.approx(three)
  exchange = roofline.all_to_all_time(64 * V, [8, 8], 2 * LINK)
  assert rings.seconds("all-to-all", ("fsdp",), V) == pytest.approx(exchange)
  assert rings.seconds("collective-permute", ("tensor",), V) == V / LINK
  assert rings.seconds("all-gather", ("tensor",), 1) == pytest.approx(4e-6)  # distance alone


def test_times_on_a_line_are_the_rooflines():
  line = torus("v5p:2x2x2", tensor=2, fsdp=4)
  assert line.rings["fsdp"] == (Ring(2, LINK, False),) * 2
  link = CHIPS["v5e"].link_bytes_per_s
  line = torus("v5e:8x4", fsdp=8, tensor=4)
  gather = roofline.all_gather_time_on_line(V, 4, link)
  assert line.seconds("all-gather", ("tensor",), V) == pytest.approx(gather)
  # half of a row's 8 V bytes cross its middle each way, half of them by one link
  assert line.seconds("all-to-all", ("fsdp",), V) == pytest.approx(8 * V / 4 / link)


def test_nodes_of_gpus():
  egress, node = CHIPS["h100-sxm"].interconnect_bytes_per_s, 4e11
  nodes = torus("h100-sxm:64", fsdp=8, tensor=8)
  inside = roofline.node_all_gather_time(V, 8, egress)
  assert nodes.seconds("all-gather", ("tensor",), V) == pytest.approx(inside)
  exchange = roofline.node_all_to_all_time(8 * V, 8, egress)
  assert nodes.seconds("all-to-all", ("tensor",), V) == pytest.approx(exchange)
  # eight groups share a node's way out
  assert nodes.seconds("all-gather", ("fsdp",), V) == pytest.approx(8 * V / node)
  assert nodes.seconds("collective-permute", ("fsdp",), V) == pytest.approx(8 * V / node)
  both = roofline.across_nodes_all_gather_time(V, node)
  assert nodes.seconds("all-reduce", ("fsdp", "tensor"), V) == pytest.approx(2 * both)
