"""Every schedule sends what it should on a mesh of all axes: by kind, axes and loop depth.

The mesh has `stage` and every axis that composes with it, so that one program for each schedule
counts each pair of a schedule and an axis.
"""

import collections
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.processes import finish, start_python
from jaxlm.train.stages import make_schedule
from sharding.collectives import Collective
from sharding.pipeline.table import make_table
from tests.jaxlm.train.staged_programs import AXES, MESH, SCHEDULES, T, V, config_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]

# Arrays that the step of each schedule sends, outside loops + in its ticks. These numbers stay as
# they are; `WRITE_COLLECTIVES=1` writes them anew where a change of them is meant.
GOLDEN = Path(__file__).with_name("staged_collectives.txt")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, dict[str, Any]]:
  folder = tmp_path_factory.mktemp("programs")
  status, printed = finish(folder, start_python(folder, "-m", "tests.jaxlm.train.staged_programs"))
  assert status == 0, printed
  programs = json.loads(printed.splitlines()[-1])
  for program in programs.values():
    for fields in program["collectives"]:
      fields |= {key: tuple(fields[key]) for key in ("axes", "shape", "loops")}
    program["collectives"] = [Collective(**fields) for fields in program["collectives"]]
  return programs


def describe(name: str, found: list[Collective]) -> list[str]:
  """Returns the lines of `GOLDEN` for a schedule: arrays of at least one axis."""
  counts = collections.Counter((c.kind, "+".join(c.axes), c.depth) for c in found if c.shape)
  kinds = sorted({(kind, axes) for kind, axes, _ in counts})
  return [
    f"{name}: {kind} over {axes}: {counts[kind, axes, 0]} + {counts[kind, axes, 1]}"
    for kind, axes in kinds
  ]


def test_kinds_axes_and_loops_stay_as_they_are(programs):
  assert tuple(programs) == SCHEDULES
  lines = [
    line for name, program in programs.items() for line in describe(name, program["collectives"])
  ]
  if os.environ.get("WRITE_COLLECTIVES"):
    GOLDEN.write_text("\n".join(lines) + "\n")
  assert lines == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tick_sends_two_permutes_and_no_gradient_whole_row_or_vocabulary(name, programs):
  in_ticks = [c for c in programs[name]["collectives"] if c.depth]
  permutes = [c for c in in_ticks if "stage" in c.axes]
  assert [c.kind for c in permutes] == ["collective-permute"] * 2
  ticks = make_table(make_schedule(config_of(name), MESH.stage)).ticks
  assert {(c.loops, c.conditional) for c in permutes} == {((ticks,), False)}
  # activations alone, between the devices of one stage
  others = [c for c in in_ticks if c.shape and c not in permutes]
  assert {c.axes for c in others} == {("tensor",), ("context_ring",), ("context_ulysses",)}
  assert not [c for c in others if {T, V} & {*c.shape}]


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_are_gathered_and_gradients_cross_data_once_a_step(name, programs):
  program = programs[name]
  found = [c for c in program["collectives"] if c.shape]
  assert {axis for c in found for axis in c.axes} == {*AXES, "stage"}
  crossing = [c for c in found if "data" in c.axes]
  assert {(c.kind, c.depth) for c in crossing} == {("all-reduce", 0)}
  assert sorted(math.prod(c.shape) for c in crossing) == sorted(program["local_sizes"])
  for kind in ("all-gather", "reduce-scatter"):
    over_fsdp = [c for c in found if c.kind == kind and "fsdp" in c.axes]
    assert {c.depth for c in over_fsdp} == {0}
    assert len(over_fsdp) == program["over_fsdp"]
