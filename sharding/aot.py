"""Compiles a program for TPUs that are not here, and reads its memory, collectives and kernels."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

from pallas_kernels.common.checks import check
from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import Topology, parse_topology, topology_devices
from sharding.collectives import Collective, read_collectives
from sharding.mesh import MeshConfig, bypass_compilation_cache, describe_sizes, make_mesh

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Holds what the compiler says of a program. Bytes are of one chip, all its devices together."""

  topology: Topology
  sizes: dict[str, int]
  """of the mesh axes"""
  argument_bytes: int
  peak_bytes: int
  """most that is held at once, arguments included"""
  temporary_bytes: int
  """of the buffers besides arguments and results; may exceed the peak, as not all live at once"""
  code_bytes: int
  collectives: tuple[Collective, ...]
  kernels: dict[str, int]
  """names of the Pallas kernels, and how many calls the program has"""
  seconds: float
  """processor time of lowering and compiling"""


def compile_for(topology: str, mesh: MeshConfig, lower: Callable[[Any], Any]) -> Program:
  """Compiles for the devices of a topology what `lower(mesh)` returns, a `jax.stages.Lowered`.

  The mesh's platform is the target's, so that operations choose the implementations that they take
  there. Raises UserError for an unknown topology, a mesh that does not fit it, and a program that
  needs more memory than a chip has.
  """
  target = parse_topology(topology)
  sizes = mesh.resolve(target.devices)
  rule = (
    f"has {target.devices} devices, mesh {describe_sizes(sizes)} uses {math.prod(sizes.values())}"
  )
  check(math.prod(sizes.values()) == target.devices, "topology", topology, rule)
  bypass_compilation_cache()  # it can write such programs, and not read them
  started = time.process_time()
  made = make_mesh(mesh, topology_devices(topology))
  try:
    compiled = lower(made).compile()
  except Exception as error:
    raise _as_user_error(error, target, describe_sizes(made.shape)) from error
  seconds = time.process_time() - started
  memory, text = compiled.memory_analysis(), compiled.as_text()
  per_chip = target.chip.devices_per_chip
  return Program(
    topology=target,
    sizes=dict(made.shape),
    argument_bytes=per_chip * memory.argument_size_in_bytes,
    peak_bytes=per_chip * memory.peak_memory_in_bytes,
    temporary_bytes=per_chip * memory.temp_size_in_bytes,
    code_bytes=per_chip * memory.generated_code_size_in_bytes,
    collectives=tuple(read_collectives(text, made.shape)),
    kernels=_kernels(text),
    seconds=seconds,
  )


def _as_user_error(error: Exception, topology: Topology, mesh: str) -> Exception:
  """Returns one line for what the compiler refuses: too much memory, a kernel that a chip lacks."""
  message = str(error).partition("\n")[0]
  if "RESOURCE_EXHAUSTED" in message:
    message = message.partition("RESOURCE_EXHAUSTED: ")[2]
  elif type(error).__name__ != "MosaicError":
    return error
  return UserError(f"topology={topology.name!r}: on mesh {mesh}: {message}")


def _kernels(text: str) -> dict[str, int]:
  """Counts the calls of each Pallas kernel by the name that the program gives it."""
  calls = re.findall(r'%([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"', text)
  return dict(sorted(collections.Counter(re.sub(r"\.[\d.]+$", "", name) for name in calls).items()))


def format_program(program: Program, outer_loops: int = 0) -> str:
  """Returns a table of memory, and of collectives by kind, axes, loops and size, largest first.

  `outer_loops` is the number of loops around the one over layers: 1 with micro-batches.
  """
  limit = program.topology.chip.hbm_bytes * program.topology.chip.devices_per_chip
  lines = [f"{'memory of a chip':<32}{'GiB':>9}{f'of {limit / _GIB:.0f} GiB':>12}"]
  for name, size in (
    ("arguments", program.argument_bytes),
    ("peak, arguments included", program.peak_bytes),
    ("temporary buffers, all", program.temporary_bytes),
    ("code", program.code_bytes),
  ):
    lines.append(f"  {name:<30}{size / _GIB:>9.3f}{size / limit:>12.1%}")
  lines += [
    "",
    "collectives (bytes on one device; of a gather the result, of a scatter the operand)",
  ]
  head = f"  {'kind':<20}{'mesh axes':<26}{'layer loop':<12}{'arrays':>7}{'MiB each':>11}"
  lines.append(f"{head}{'times':>8}{'MiB a step':>12}")
  groups: dict[tuple[Any, ...], int] = collections.Counter(
    (c.kind, c.axes, c.depth > outer_loops, c.bytes, c.times) for c in program.collectives
  )
  totals = {group: n * group[3] * (group[4] or 1) for group, n in groups.items()}
  shown = [group for group in groups if totals[group] >= 1e-3 * sum(totals.values())]
  for group in sorted(shown, key=lambda group: -totals[group]):
    kind, axes, in_loop, size, times = group
    line = f"  {kind:<20}{' '.join(axes):<26}{'inside' if in_loop else 'outside':<12}"
    line += f"{groups[group]:>7}{size / 2**20:>11.3f}{'?' if times is None else times:>8}"
    lines.append(f"{line}{totals[group] / 2**20:>12,.1f}")
  rest = [group for group in groups if group not in shown]
  if rest:
    arrays, total = sum(groups[g] for g in rest), sum(totals[g] for g in rest)
    lines.append(f"  {'smaller ones':<58}{arrays:>7}{'':>19}{total / 2**20:>12,.1f}")
  kernels = ", ".join(f"{name} {count}" for name, count in program.kernels.items()) or "none"
  return "\n".join([*lines, "", f"Pallas kernels and their calls: {kernels}"])
