"""The reader of compiled programs: kinds, mesh axes, bytes and loops of what devices exchange."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.collectives import Collective, element_bytes, read_collectives

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def sent() -> list[Collective]:
  """What a program of one scan of 3 with a scan of 5 and a branch in it sends."""
  mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Explicit,) * 3)

  def right(x):
    return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

  def exchange(x_AB, _):
    def inner(x_AB, _):
      return jnp.sin(right(x_AB)), None

    x_AB, _ = jax.lax.scan(inner, x_AB, None, length=5)
    wanted = jax.lax.axis_index("data") == 0
    both = jax.lax.all_to_all(x_AB, ("fsdp", "tensor"), 0, 1, tiled=True).reshape(x_AB.shape)
    summed = jax.lax.cond(wanted, lambda x: jax.lax.psum(x, "fsdp"), lambda x: 2 * x, x_AB)
    return jnp.cos(summed) + both, None

  def program(x_AB):
    x_AB, _ = jax.lax.scan(exchange, x_AB, None, length=3)
    return jax.lax.all_gather(x_AB, "data", axis=0, tiled=True)

  with jax.set_mesh(mesh):
    x_AB = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    split = jax.shard_map(program, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(split).lower(x_AB).compile().as_text()
  return read_collectives(text, mesh.shape)


def test_kind_axes_and_loops_of_each(sent):
  # XLA on CPU writes an all-to-all as one array for each device
  read = {(c.kind, c.axes, c.group, c.loops, c.conditional) for c in sent}
  assert read == {
    ("collective-permute", ("tensor",), 2, (3, 5), False),
    ("all-to-all", ("fsdp", "tensor"), 4, (3,), False),
    ("all-reduce", ("fsdp",), 2, (3,), True),
    ("all-gather", ("data",), 2, (), False),
  }
  assert all("jit(program)" in c.source for c in sent)


def test_bytes_and_times_of_each(sent):
  by_kind = {}
  for c in sent:
    by_kind.setdefault(c.kind, []).append(c)
  array = 8 * 64
  for kind, elements, times in (
    ("collective-permute", array, 15),
    ("all-to-all", array, 3),
    ("all-reduce", array, 3),
    ("all-gather", 2 * array, 1),
  ):
    # the CPU's compiler may compute bfloat16 in float32
    assert sum(c.bytes / element_bytes(c.dtype) for c in by_kind[kind]) == elements
    assert {c.times for c in by_kind[kind]} == {times}


def read_one(line: str, before: str = "") -> Collective:
  text = f"HloModule m\n\n{before}ENTRY %main (p: f32[4]) -> f32[4] {{\n  ROOT %x = {line}\n}}\n"
  (collective,) = read_collectives(text, MESH)
  return collective


@pytest.mark.parametrize(
  "groups, axes, size",
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
    ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
    ("{}", ("data", "fsdp", "tensor"), 8),
    ("[4,2]<=[8]", ("tensor",), 2),
    ("[4,2]<=[4,2]T(1,0)", ("fsdp",), 2),
    ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
    ("[2,4]<=[8]", ("fsdp", "tensor"), 4),
    ("mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp"), 4),
    ("mesh['a'=4,'b'=2] {'a':(1)2}", ("data",), 2),
    ("mesh['a'=4,'b'=2] {'a':(2)2}", ("fsdp",), 2),
    ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", ("fsdp", "tensor"), 4),
    ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'c'}", ("data",), 2),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp", "tensor"), 4),
  ],
)
def test_every_notation_of_groups(groups, axes, size):
  read = read_one(f"f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%a")
  assert (read.kind, read.axes, read.group) == ("all-reduce", axes, size)


def test_operations_that_start_and_finish():
  gather = "(f32[2]{0}, f32[4]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}"
  assert read_one(gather).shape == (4,)
  permute = (
    "(bf16[2,3]{1,0:T(8,128)(2,1)}, bf16[2,3]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
    "collective-permute-start(%p), source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6}}"
  )
  read = read_one(permute)
  assert (read.kind, read.axes, read.shape, read.dtype) == (
    "collective-permute",
    ("fsdp",),
    (2, 3),
    "bf16",
  )


def test_fusions_of_the_tpu_compiler():
  scatter = (
    "%all-reduce-scatter.1 (i: f32[8]) -> f32[4] {\n"
    "  %r = f32[8]{0} all-reduce(%i), replica_groups=[4,2]<=[8], to_apply=%a\n}\n\n"
  )
  read = read_one("f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", scatter)
  assert (read.kind, read.shape, read.result_bytes, read.bytes) == ("reduce-scatter", (4,), 16, 32)
  part = 'f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="7"}'
  parts = f"%start (i: f32[4]) -> f32[8] {{\n  %g = {part}\n}}\n\n%end (i: f32[4]) -> f32[8] {{\n"
  parts += f"  %g = {part}\n}}\n\n%both (i: f32[4]) -> f32[8] {{\n"
  parts += "  %s = f32[8]{0} fusion(%p), calls=%start\n  %e = f32[8]{0} fusion(%p), calls=%end\n"
  assert read_one("f32[4]{0} fusion(%p), calls=%both", parts + "}\n\n").shape == (8,)


def test_trip_counts_that_only_the_condition_names():
  body = (
    "%body (i: f32[4]) -> f32[4] {\n"
    "  %r = f32[4]{0} all-reduce(%i), replica_groups={}, to_apply=%a\n}\n\n"
  )
  condition = (
    "%condition (i: f32[4]) -> pred[] {\n  %n = s32[]{:T(128)} constant(12)\n"
    "  ROOT %l = pred[] compare(%i, %n), direction=LT\n}\n\n"
  )
  loop = "f32[4] while(%p), condition=%condition, body=%body"
  assert read_one(loop, body + condition).loops == (12,)
  read = read_one(loop, body + condition.replace("LT", "NE"))
  assert read.loops == (None,) and read.times is None


def test_bytes_of_an_element():
  sizes = {"pred": 1, "s4": 0.5, "bf16": 2, "f8e4m3fn": 1, "f32": 4, "token": 0}
  assert {name: element_bytes(name) for name in sizes} == sizes
