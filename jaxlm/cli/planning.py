"""Defines `jaxlm plan` and `jaxlm compile`, which need none of the chips that they are about."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import tyro

from jaxlm.cli.presets import list_presets
from jaxlm.cli.training import TrainFlags, parse_config, without_flags
from jaxlm.config import MeshConfig, check

_TOPOLOGY = "must be given, as in --topology v5p:8x8x8"
_SHAPES_ONLY = "deepseek_v3_shapes"
_MICRO_BATCHES = tuple(2**power for power in range(11))
_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PlanFlags(TrainFlags):
  """Say what a training step takes on chips that need not be there, and find the best mesh.

  A mesh that is given is planned; by default all legal ones are, and the best is shown. Micro-
  batches are chosen unless --accumulate says how many. With fewer rows than devices, each device
  gets one.
  """

  topology: str = ""
  """chips in their network: CHIP:SHAPE, as in v5p:8x8x8, tpu7x:4x4x4 or h100-sxm:64"""
  axes: tuple[str, ...] = tuple(MeshConfig().sizes())
  """mesh axes that the search may use"""
  figure: Path | None = None
  """draw the best meshes into this picture (extra plot)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ShapesFlags:
  """Plan a model of which only the shapes are known here."""

  topology: str = ""
  """chips in their network: CHIP:SHAPE, as in v5p:8x16x16 or h100-sxm:2048"""
  batch: int = 16384
  """rows per step, over all devices"""
  length: int = 4096
  """predicted tokens per row"""
  accumulate: int = 1
  """micro-batches; 1 chooses"""
  mesh: MeshConfig = MeshConfig()
  axes: tuple[str, ...] = tuple(MeshConfig().sizes())
  """mesh axes that the search may use"""
  figure: Path | None = None
  """draw the best meshes into this picture (extra plot)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CompileFlags(TrainFlags):
  """Compile the training step for TPUs that are not here; report its memory and collectives.

  The step is the one that `train` compiles there, with the TPU's kernels. Without a mesh the best
  one of `jaxlm plan` is taken, of those that the model can run on. Needs libtpu (extra tpu).
  """

  topology: str = ""
  """TPU chips in their network: CHIP:SHAPE, as in v5p:8x8x8 or tpu7x:4x4x4"""


def plan(arguments: list[str]) -> int:
  """Runs `jaxlm plan PRESET --topology CHIP:SHAPE [flags]`."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print("usage: jaxlm plan PRESET --topology CHIP:SHAPE [flags]   (`jaxlm plan PRESET --help`)")
    print(f"\npresets, and {_SHAPES_ONLY} (only a plan knows it)\n{list_presets()}")
    return 0 if arguments else 2
  from pallas_kernels.common.topology import parse_topology
  from sharding.plan import Step, deepseek_v3_shapes

  preset, flags = arguments[0], arguments[1:]
  if preset == _SHAPES_ONLY:
    options = tyro.cli(_ShapesFlags, args=flags, prog=f"jaxlm plan {preset}")
    check(options.topology != "", "topology", options.topology, _TOPOLOGY)
    step = Step(batch=options.batch, length=options.length, accumulate=options.accumulate)
    topology, model = parse_topology(options.topology), deepseek_v3_shapes()
    return _print_plan(model, step, topology, options.mesh, options.axes, options.figure)
  config = parse_config("plan", preset, flags, _PlanFlags)
  check(config.topology != "", "topology", config.topology, _TOPOLOGY)
  from jaxlm.scaling.shapes import model_shapes, step_shapes, with_rows_for

  topology = parse_topology(config.topology)
  model = model_shapes(config.model, preset)
  step = step_shapes(with_rows_for(config, topology.devices))
  return _print_plan(model, step, topology, config.mesh, config.axes, config.figure)


def _print_plan(model, step, topology, mesh: MeshConfig, axes, figure: Path | None) -> int:
  from sharding.plan import best_plans, make_plan
  from sharding.plan.report import draw_plans, format_plan

  active = model.active_parameters / 1e9
  of_them = f" ({active:.1f}B for a token)" if active < 0.9 * model.parameters / 1e9 else ""
  print(f"{model.name}: {model.parameters / 1e9:.2f}B parameters{of_them}, {topology.name}:")
  print(f"{topology.chips} chips, batch of {step.batch:,} rows of {step.length:,} tokens")
  micro_batches = () if step.accumulate > 1 else _MICRO_BATCHES
  known = tuple(MeshConfig().sizes())
  for axis in axes:
    check(axis in known, "axes", axis, f"must be of {', '.join(known)}")
  best = best_plans(model, step, topology, axes=axes, accumulate=micro_batches)
  shown = best[0]
  if mesh != MeshConfig():
    shown = make_plan(model, step, topology, mesh.resolve(topology.devices))
  print(format_plan(shown, best[:_SHOWN]))
  if figure is not None:
    others = [other for other in best[:_SHOWN] if other is not shown]
    draw_plans([shown, *others][:_SHOWN], figure)
    print(f"drew {figure}")
  return 0


def compile_step(arguments: list[str]) -> int:
  """Runs `jaxlm compile PRESET --topology CHIP:SHAPE [flags]`."""
  if not arguments or arguments[0] in ("-h", "--help"):
    usage = "usage: jaxlm compile PRESET --topology CHIP:SHAPE [flags]"
    print(f"{usage}   (`jaxlm compile PRESET --help`)\n\npresets\n{list_presets()}")
    return 0 if arguments else 2
  config = parse_config("compile", arguments[0], arguments[1:], _CompileFlags)
  check(config.topology != "", "topology", config.topology, _TOPOLOGY)
  os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and libtpu need not look for a host of TPUs
  os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  from jaxlm.run.ahead import compile_ahead, runnable
  from sharding.aot import format_program
  from sharding.mesh import describe_sizes

  topology = config.topology
  planned = runnable(without_flags(config), topology)
  rows = f"batch of {planned.batch:,} rows of {planned.data.length:,} tokens"
  micro = f"in {planned.accumulate} micro-batches" if planned.accumulate > 1 else "at once"
  print(f"{arguments[0]} on {topology}, {rows}, {micro}", flush=True)
  program = compile_ahead(planned, topology)
  seconds = f"compiled in {program.seconds:.0f} s of processor time"
  print(f"mesh {describe_sizes(program.sizes)}, {seconds}\n")
  print(format_program(program, outer_loops=int(planned.accumulate > 1)))
  return 0
