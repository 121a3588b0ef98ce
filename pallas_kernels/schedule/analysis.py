"""`analyse`: a schedule and its HBM traffic put together.

Not visible to it: the latency of copies and stalls on them, conflicts of VMEM banks, how long a loop with a dynamic
bound runs, how often a conditional region runs (regions with matmuls count at every step, those without once per
sweep of the last grid axis), and whatever XLA does around the kernel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.schedule.chips import CHIPS
from pallas_kernels.schedule.compiler import chip_mesh, compile_with_listings
from pallas_kernels.schedule.listing import DumpError, Schedule, Total
from pallas_kernels.schedule.traffic import Call, pallas_calls

COPY_US = 0.35
"""A step that starts a copy lasts at least its round trip: the 128-cubed matmul of JAX's Pallas guide, on v5e."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """One kernel on one chip; times are of all its calls in the program."""

  kernel: str
  chip: str
  grid: tuple[int, ...]
  calls: int
  operands: str
  """what the MXU multiplies"""
  step_cycles: float
  """of one core, per grid step"""
  cycles: float
  """of one core, all steps of all calls"""
  mxu_use: float
  """share of the cycles in which the MXUs are busy"""
  hbm_bytes: float
  spills: float
  """vector registers stored to VMEM for want of registers, per step"""
  vmem_bytes: int
  """that one core allocates"""
  core_us: float
  hbm_us: float
  copy_us: float
  us: float
  """estimate: the largest of core, HBM and copy starts"""
  flops: float
  """useful ones where given, else those counted"""
  counted_flops: float
  """that the MXU instructions do; a region that multiplies counts at every step, even if it runs at some only"""
  of_peak: float
  """flops / (us * the device's peak)"""
  of_roofline: float
  """max(flops / peak, needed bytes / bandwidth) / us"""
  notes: tuple[str, ...]


def analyse(
  fn: Callable[..., Any], args: Any, chip: str, *, flops: float | None = None, kernel: str = ""
) -> list[Finding]:
  """Compiles `fn(*args)` for one device of `chip` and reads the schedule of its Pallas kernels.

  Args:
    args: arrays or ShapeDtypeStructs; concrete ones where a kernel's block indices depend on them.
    chip: "v5e", "v5p", "v6e" or "tpu7x".
    flops: useful ones of each kernel, all its calls; by default those that its MXU instructions do.
    kernel: only kernels whose name contains this.

  Raises:
    ValueError: unknown chip. DumpError (a ValueError): listings that cannot be read, or a kernel without one.
    RuntimeError: libtpu was loaded before without the flags that make it write listings.
  """
  if chip not in CHIPS:
    raise ValueError(f"chip={chip!r}: must be one of {', '.join(CHIPS)}")
  with jax.set_mesh(chip_mesh(chip)):
    closed = jax.make_jaxpr(fn)(
      *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tuple(args))
    )
  leaves = [
    None if isinstance(a, jax.ShapeDtypeStruct) else np.asarray(a) for a in jax.tree.leaves(args)
  ]
  calls = list(pallas_calls(closed.jaxpr, closed.consts, leaves))
  compiled, listings = compile_with_listings(fn, args, chip)
  named = re.findall(
    r"%([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text()
  )
  pairs = match(calls, named)
  return [finding(call, name, listings, chip, flops) for call, name in pairs if kernel in name]


def match(calls: list[Call], kernels: list[str]) -> list[tuple[Call, str]]:
  """Pairs each call with the instruction that bears its name (transformations wrap it); DumpError where none does."""
  free, pairs = list(kernels), []
  for call in sorted(
    calls, key=lambda call: call.name == ""
  ):  # nameless ones take what is left, in order
    kernel = min(
      (name for name in free if call.name in name),
      key=len if call.name else free.index,
      default=None,
    )
    if kernel is None:
      raise DumpError(f"no instruction for the Pallas call {call.name!r} among {kernels}")
    free.remove(kernel)
    pairs.append((call, kernel))
  return pairs


def finding(
  call: Call, kernel: str, listings: dict[str, dict[str, str]], chip_name: str, flops: float | None
) -> Finding:
  texts = listings.get(kernel, {})
  if not {"bundles", "use", "original"} <= set(texts):
    raise DumpError(f"{kernel}: of the listings only {sorted(texts)} were written")
  chip = CHIPS[chip_name]
  schedule = Schedule(texts["bundles"], texts["use"], chip)
  step, cycles = count_cycles(schedule, call)
  vmem = sum(
    int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", texts["original"])
  )
  kind = (
    max(step.matmuls, key=lambda kind: step.matmuls[kind] * kind.rows).operands
    if step.matmuls
    else "none"
  )
  issued = (
    call.calls
    * call.steps
    * sum(2 * n * k.rows * chip.mxu_side**2 for k, n in step.matmuls.items())
  )
  useful = issued if flops is None else flops
  peak = chip.peaks.get(kind, chip.peaks["bf16"]) * 1e6
  core_us = call.calls * cycles / chip.clock / 1e3
  hbm_us = call.calls * call.moved / chip.bandwidth / 1e3
  copy_us = call.calls * COPY_US * call.copy_steps / chip.cores
  us = max(core_us, hbm_us, copy_us)
  dynamic = sum(loop.trips is None for loop in schedule.loops()) - (call.steps > 1)
  return Finding(
    kernel=call.name or re.sub(r"\.\d+$", "", kernel),
    chip=chip_name,
    grid=call.grid,
    calls=call.calls,
    operands=kind,
    step_cycles=step.cycles,
    cycles=call.calls * cycles,
    mxu_use=step.mxu_use(chip),
    hbm_bytes=call.calls * call.moved,
    spills=step.units["VSTORE:SPILL"],
    vmem_bytes=vmem,
    core_us=core_us,
    hbm_us=hbm_us,
    copy_us=copy_us,
    us=us,
    flops=useful,
    counted_flops=issued,
    of_peak=useful / peak / us,
    of_roofline=max(useful / peak, call.calls * call.needed / chip.bandwidth / 1e3) / us,
    notes=(
      *call.notes,
      *((f"{dynamic} loops with a dynamic bound count once",) if dynamic > 0 else ()),
    ),
  )


def count_cycles(schedule: Schedule, call: Call) -> tuple[Total, float]:
  """What one grid step executes, and the cycles of a core over the whole call. The first loop is the grid's."""
  body = next(schedule.loops(), None) if call.steps > 1 else None
  if body is None:
    step = schedule.total(schedule.root, 1.0)
    return step, step.cycles
  step = schedule.total(body, 1 / max(call.grid[-1], 1))
  around = len(schedule.bundles) - (body.end - body.start)
  return step, around + call.steps / schedule.chip.cores * step.cycles
