"""Puts a kernel's schedule and its HBM traffic together: time, MXU use and share of the roofline.

Not visible to `analyse`: the latency of copies and stalls on them, conflicts of VMEM banks, how
long a loop with a dynamic bound runs, how often a conditional region runs (regions with matmuls
count at every step, those without once per sweep of the last grid axis), and whatever XLA does
around the kernel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.common.checks import check, check_choice
from pallas_kernels.common.chips import CHIPS, CORES, Chip
from pallas_kernels.schedule.compiler import chip_mesh, compile_with_listings, dump_folder
from pallas_kernels.schedule.listing import DumpError, KernelSchedule, Total
from pallas_kernels.schedule.traffic import Call, pallas_calls

COPY_US = 0.35
"""Least time of a step that starts a copy: the 128-cubed matmul of JAX's Pallas guide, on v5e."""


UNITS = {
  "VALU": "vector operations",
  "EUP": "exponentials, roots, logarithms",
  "XLU": "transposes, shuffles",
  "VLOAD": "loads",
  "VSTORE": "stores",
}
"""Functional units beside the MXUs, as the compiler names them; loads and stores with spills."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """Holds the numbers of one kernel on one chip; times are of all its calls in the program."""

  kernel: str
  chip: str
  grid: tuple[int, ...]
  calls: int
  operands: str
  """What the MXU multiplies."""
  step_cycles: float
  """Of one core, per grid step."""
  cycles: float
  """Of one core, all steps of all calls."""
  mxu_use: float
  """Share of the cycles in which the MXUs are busy."""
  unit_cycles: dict[str, float]
  """Of one core, all steps of all calls: how long HBM and each of `UNITS` would take alone."""
  hbm_bytes: float
  spills: float
  """Vector registers stored to VMEM for want of registers, per step."""
  vmem_bytes: int
  """What one core allocates."""
  core_us: float
  hbm_us: float
  copy_us: float
  us: float
  """Estimated time: the largest of core, HBM and copy starts."""
  flops: float
  """Useful ones where given, else those counted."""
  counted_flops: float
  """What the MXU instructions do; a region that multiplies counts at every step."""
  of_peak: float
  """flops / (us * the device's peak)."""
  of_roofline: float
  """max(flops / peak, needed bytes / HBM rate) / us."""
  notes: tuple[str, ...]


def analyse(
  fn: Callable[..., Any],
  args: Any,
  chip: str,
  *,
  flops: float | None = None,
  kernel: str = "",
  trips: Sequence[float] = (),
) -> list[Finding]:
  """Compiles `fn(*args)` for one device of `chip` and reads the schedule of its Pallas kernels.

  Args:
    args: arrays or ShapeDtypeStructs; concrete ones where a kernel's block indices depend on them.
    chip: "v5e", "v5p", "v6e" or "tpu7x".
    flops: useful ones of each kernel, all its calls; by default what its MXU instructions do.
    kernel: only kernels whose name contains this.
    trips: of a kernel's loops with a dynamic bound, in the order of its listing, outer ones first;
      by default each counts once.

  Raises:
    UserError: unknown chip.
    DumpError: a listing that cannot be read, or a kernel without one.
    RuntimeError: libtpu was loaded before without the flags that make it write listings.
  """
  check_choice("chip", chip, tuple(CORES))
  dump_folder()
  with jax.set_mesh(chip_mesh(chip)):
    closed = jax.make_jaxpr(fn)(
      *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tuple(args))
    )
  leaves = [
    None if isinstance(a, jax.ShapeDtypeStruct) else np.asarray(a) for a in jax.tree.leaves(args)
  ]
  calls = list(pallas_calls(closed.jaxpr, closed.consts, leaves))
  compiled, listings = compile_with_listings(fn, args, chip)
  instructions = re.findall(
    r"%([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text()
  )
  return [
    summarise(call, name, listings.get(name, {}), CHIPS[chip], flops, trips)
    for call, name in match(calls, instructions)
    if kernel in name
  ]


def match(calls: list[Call], kernels: list[str]) -> list[tuple[Call, str]]:
  """Pairs each call with the instruction that bears its name, which transformations may wrap.

  Calls without a name take what is left, in order. Raises DumpError where none is left.
  """
  unmatched, pairs = list(kernels), []
  for call in sorted(calls, key=lambda call: call.name == ""):
    candidates = [name for name in unmatched if call.name in name]
    if not candidates:
      raise DumpError(f"no instruction for the Pallas call {call.name!r} among {kernels}")
    kernel = min(candidates, key=len) if call.name else candidates[0]
    unmatched.remove(kernel)
    pairs.append((call, kernel))
  return pairs


def summarise(
  call: Call,
  kernel: str,
  listings: dict[str, str],
  chip: Chip,
  flops: float | None,
  trips: Sequence[float] = (),
) -> Finding:
  """Returns the finding for one call from the listings of its kernel."""
  if not {"bundles", "use", "original"} <= set(listings):
    raise DumpError(f"{kernel}: of the listings only {sorted(listings)} were written")
  core = CORES[chip.name]
  schedule = KernelSchedule(listings["bundles"], listings["use"], core, trips)
  step, cycles = count_cycles(schedule, call)
  sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", listings["original"])
  counted = sum(2 * n * k.rows * core.mxu_side**2 for k, n in step.matmuls.items())
  counted *= call.calls * call.steps
  useful = counted if flops is None else flops
  operands = "none"
  if step.matmuls:
    operands = max(step.matmuls, key=lambda kind: step.matmuls[kind] * kind.rows).operands
  peak = peak_flops(chip, operands)
  core_us = call.calls * cycles / core.clock * 1e6
  hbm_us = call.calls * call.moved / chip.hbm_bytes_per_s * 1e6
  copy_us = call.calls * COPY_US * call.copy_steps / core.count
  us = max(core_us, hbm_us, copy_us)
  steps = call.calls * call.steps / core.count
  unit_cycles = {unit: steps * step.units[unit] / schedule.slots.get(unit, 1) for unit in UNITS}
  unit_cycles |= {"MXU": step.mxu_use(core) * steps * step.cycles, "HBM": hbm_us * core.clock / 1e6}
  roofline_us = max(useful / peak, call.calls * call.needed / chip.hbm_bytes_per_s) * 1e6
  grid = next(schedule.loops(), None) if call.steps > 1 else None
  dynamic_loops = sum(loop is not grid for loop in schedule.dynamic)
  notes = list(call.notes)
  if trips:
    check(dynamic_loops == len(trips), "trips", trips, f"{kernel} has {dynamic_loops} such loops")
    notes.append(f"loops with a dynamic bound count {', '.join(f'{n:g}' for n in trips)} times")
  elif dynamic_loops > 0:
    notes.append(f"{dynamic_loops} loops with a dynamic bound count once")
  return Finding(
    kernel=call.name or re.sub(r"\.\d+$", "", kernel),
    chip=chip.name,
    grid=call.grid,
    calls=call.calls,
    operands=operands,
    step_cycles=step.cycles,
    cycles=call.calls * cycles,
    mxu_use=step.mxu_use(core),
    unit_cycles=unit_cycles,
    hbm_bytes=call.calls * call.moved,
    spills=step.units["VSTORE:SPILL"],
    vmem_bytes=sum(int(size, 16) for size in sizes),
    core_us=core_us,
    hbm_us=hbm_us,
    copy_us=copy_us,
    us=us,
    flops=useful,
    counted_flops=counted,
    of_peak=useful / (peak * us * 1e-6),
    of_roofline=roofline_us / us,
    notes=tuple(notes),
  )


def peak_flops(chip: Chip, operands: str) -> float:
  """Returns the device's peak FLOP/s for what its MXU multiplies; widened operands run as bf16."""
  peaks = {"s8": chip.int8_flops, "s4": chip.int4_flops, "f8": chip.fp8_flops}
  peak = peaks.get(operands) or chip.bf16_flops
  assert peak is not None, f"{chip.name} has no matrix unit"
  return peak


def count_cycles(schedule: KernelSchedule, call: Call) -> tuple[Total, float]:
  """Returns what one grid step executes and a core's cycles; the first loop is the grid's."""
  body = next(schedule.loops(), None) if call.steps > 1 else None
  if body is None:
    step = schedule.total(schedule.root, 1.0)
    return step, step.cycles
  step = schedule.total(body, 1 / max(call.grid[-1], 1))
  around = len(schedule.bundles) - (body.end - body.start)
  return step, around + call.steps / schedule.core.count * step.cycles
