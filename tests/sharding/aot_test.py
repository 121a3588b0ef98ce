"""What becomes of a compiler's errors, and how a program is shown."""

import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import parse_topology
from sharding.aot import Program, compile_for, format_program
from sharding.collectives import Collective
from sharding.mesh import MeshConfig


@pytest.mark.parametrize(
  "kind, message, line",
  [
    (
      "JaxRuntimeError",
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 33.21G exceed (15.75G).\nmore",
      "topology='v5e:2x2': on mesh fsdp 4: Ran out of memory on HBM, 33.21G exceed (15.75G).",
    ),
    ("MosaicError", "INTERNAL: no such product\nmore", "on mesh fsdp 4: INTERNAL: no such product"),
  ],
)
def test_what_the_compiler_refuses_is_one_line(kind, message, line):
  pytest.importorskip("libtpu")

  def lower(mesh):
    assert dict(mesh.shape)["fsdp"] == 4
    raise type(kind, (RuntimeError,), {})(message)

  with pytest.raises(UserError) as raised:
    compile_for("v5e:2x2", MeshConfig(data=1, fsdp=4), lower)
  assert line in str(raised.value) and "\n" not in str(raised.value)


def test_other_errors_are_raised_as_they_are():
  pytest.importorskip("libtpu")

  def lower(mesh):
    raise KeyError("a fault of the program")

  with pytest.raises(KeyError):
    compile_for("v5e:2x2", MeshConfig(), lower)


def test_a_program_is_shown_by_kind_axes_loop_and_size():
  def collective(kind, axes, shape, loops):
    return Collective(
      kind=kind,
      axes=axes,
      group=4,
      dtype="f32",
      shape=shape,
      loops=loops,
      conditional=False,
      source="",
    )

  program = Program(
    topology=parse_topology("tpu7x:2x2x1"),
    sizes={"fsdp": 8},
    argument_bytes=2**30,
    peak_bytes=2**31,
    temporary_bytes=2**29,
    code_bytes=2**20,
    collectives=(
      *[collective("all-gather", ("fsdp",), (2**18,), (2, 7))] * 3,
      collective("reduce-scatter", ("fsdp",), (2**16,), (2,)),
      collective("all-reduce", ("fsdp",), (2**18,), (None,)),
      collective("all-reduce", ("fsdp",), (), ()),
    ),
    kernels={"kernel": 2},
    seconds=1.0,
  )
  lines = [line.split() for line in format_program(program, outer_loops=1).splitlines()]
  assert ["arguments", "1.000", "0.5%"] in lines and ["peak,", "arguments", "included"] in [
    line[:3] for line in lines
  ]
  assert ["all-gather", "fsdp", "inside", "3", "1.000", "14", "42.0"] in lines
  assert ["reduce-scatter", "fsdp", "outside", "1", "1.000", "2", "2.0"] in lines
  assert ["all-reduce", "fsdp", "outside", "1", "1.000", "?", "1.0"] in lines
  assert ["smaller", "ones", "1", "0.0"] in lines
  assert lines[-1][-2:] == ["kernel", "2"]
