"""What programs on a mesh send and keep in memory, from the compiler alone: nothing is timed.

    python -m benchmarks.sharding --write benchmarks/results/sharding_cpu2.md

Compiles for eight CPU devices, whose compiler writes a reduce-scatter as an all-reduce and an
all-to-all as an array for each device.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks.table import publish, report, table
from jaxlm import presets
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, PipelineConfig, TrainConfig, decoder
from jaxlm.run.ahead import compile_ahead, runnable
from jaxlm.run.text import TextTask
from jaxlm.train.lowering import lower_step
from sharding import make_mesh
from sharding.collectives import read_collectives
from sharding.context import hybrid_attention, ring
from sharding.context.order import ORDERS
from sharding.pipeline import Times, schedules, simulate
from sharding.pipeline.table import coupled_makespan, make_table

LAYOUTS = (
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=1, context_ring=8),
  MeshConfig(data=1, context_ulysses=8),
  MeshConfig(data=1, context_ring=4, context_ulysses=2),
  MeshConfig(data=1, fsdp=2, context_ring=2, tensor=2),
  MeshConfig(data=2, stage=4),
)
STEP = TrainConfig(
  batch=32,
  accumulate=2,
  model=decoder(V=512, D=128, F=352, N=8, K=4, H=16, layers=4),
  compute=ComputeConfig(scan="always"),
  data=DataConfig(length=256, layout="packed"),
)
RING_LENGTH, RANKS = 4096, 4
RANKS_OF_PIPELINE, MICROBATCHES = 8, 32
MEASURED = Times(forward=1.0, input_gradient=1.14, weight_gradient=0.86)
MAKERS = {
  "gpipe": schedules.gpipe,
  "1f1b": schedules.one_f_one_b,
  "interleaved": lambda ranks, count: schedules.interleaved(ranks, count, 2),
  "zb_h1": schedules.zb_h1,
  "zb_h2": schedules.zb_h2,
  "zb_v": schedules.zb_v,
  "dualpipev": schedules.dualpipev,
}


def compile_step(config: TrainConfig) -> jax.stages.Compiled:
  """Compiles the training step of a configuration for the CPU devices of its mesh."""
  task = TextTask(config)
  return lower_step(config, task, task.batch_types(), make_mesh(config.mesh)).compile()


def collectives_of_a_step() -> str:
  """Returns what a training step sends, per layout: each kind over each set of axes."""
  rows = []
  for mesh in LAYOUTS:
    program = compile_step(dataclasses.replace(STEP, mesh=mesh)).as_text()
    arrays: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    for c in read_collectives(program, mesh.resolve(8)):
      if c.shape:  # scalars are sums of losses and norms
        arrays[c.kind, c.axes, c.depth] += 1
        sizes[c.kind, c.axes, c.depth] += c.bytes * (c.times or 1)
    for kind, axes, depth in sorted(arrays):
      key = (kind, axes, depth)
      mib = f"{sizes[key] / 2**20:.2f}"
      rows.append([mesh.describe(), kind, " x ".join(axes), depth, arrays[key], mib])
  columns = ["mesh", "kind", "over", "loops around", "arrays in the program", "MiB per step"]
  text = "A step of 2 micro-batches of 16 rows of 256 tokens, 4 layers in a loop, D 128, float32. "
  text += "Loops are those over micro-batches, layers and hops. MiB are those of the whole arrays "
  text += "on one device (before a reduce-scatter, after a gather), times how often they are sent."
  return f"## Collectives of a training step\n\n{text}\n\n{table(columns, rows)}"


def memory_of_a_ring() -> str:
  """Returns the temporary memory of attention with gradients, by order and kind of gradient."""
  mesh = MeshConfig(data=1, context_ring=RANKS)
  automatic = mock.patch.object(ring, "_attend", lambda *arguments: ring._forward(*arguments)[0])
  rows = []
  for order in ORDERS:
    own = _attention_bytes(mesh, order)
    with automatic:
      differentiated = _attention_bytes(mesh, order)
    mib = [f"{size / 2**20:.1f}" for size in (own, differentiated)]
    rows.append([order, *mib, f"{own / differentiated:.2f}"])
  columns = ["order", "own backward pass, MiB", "automatic differentiation, MiB", "ratio"]
  text = (
    f"One layer's output and gradients of {RING_LENGTH} tokens on {RANKS} devices, 8 query and 2"
  )
  text += " key heads of 32, float32: temporary memory of the program on one device."
  return f"## Memory of ring attention\n\n{text}\n\n{table(columns, rows)}"


def _attention_bytes(mesh: MeshConfig, order: str) -> int:
  with jax.set_mesh(make_mesh(mesh)):
    place = jax.NamedSharding(jax.sharding.get_mesh(), P(None, "context_ring"))
    shapes = [(1, RING_LENGTH, heads, 32) for heads in (8, 2, 2, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for shape in shapes]

    def with_gradients(q_BTNH, k_BTKH, v_BTKH, do_BTNH):
      def attend(*arrays):
        return hybrid_attention(*arrays, order=order)

      o_BTNH, pull = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)
      return o_BTNH, pull(do_BTNH)

    compiled = jax.jit(with_gradients).lower(*arrays).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def memory_of_schedules() -> str:
  """Returns the temporary memory of a training step in 4 stages by schedule."""
  rows = []
  for name in ("gpipe", "1f1b", "zb_h1", "zb_h2", "zb_v"):
    model = dataclasses.replace(STEP.model, layers=8)
    pipeline = PipelineConfig(schedule=name)
    mesh = MeshConfig(data=2, stage=4)
    config = dataclasses.replace(STEP, model=model, mesh=mesh, accumulate=8, pipeline=pipeline)
    simulation = simulate(MAKERS[name](4, 8))
    held = max(simulation.peak_activations) * 4 / simulation.schedule.stages
    size = compile_step(config).memory_analysis().temp_size_in_bytes
    rows.append([name, f"{held:g}", f"{size / 2**20:.1f}"])
  columns = ["schedule", "activations of a rank, simulated", "MiB"]
  text = (
    "The step above with 8 layers and 8 micro-batches on data 2 x stage 4: temporary memory of "
  )
  text += "the program on one device."
  return f"## Memory of pipeline schedules\n\n{text}\n\n{table(columns, rows)}"


def bubbles() -> str:
  """Returns simulated bubbles beside their formulas, and the price of running as one program."""
  t = Times()
  backward = t.input_gradient + t.weight_gradient
  fused = (RANKS_OF_PIPELINE - 1) * (t.forward + backward)
  formulas = {
    "gpipe": fused,
    "1f1b": fused,
    "interleaved": fused,
    "zb_h1": (RANKS_OF_PIPELINE - 1) * (t.forward + t.input_gradient - t.weight_gradient),
    "zb_h2": (RANKS_OF_PIPELINE - 1)
    * max(0.0, t.forward + t.input_gradient - 2 * t.weight_gradient),
    "zb_v": 0.0,
    "dualpipev": (RANKS_OF_PIPELINE - 1) * (t.forward + 2 * backward - 3 * t.weight_gradient),
  }
  rows = []
  for name, make in MAKERS.items():
    schedule = make(RANKS_OF_PIPELINE, MICROBATCHES)
    equal, measured = simulate(schedule), simulate(schedule, MEASURED)
    price = coupled_makespan(make_table(schedule), MEASURED) / measured.makespan - 1
    rows.append(
      (
        name,
        f"{min(equal.idle):g}",
        f"{formulas[name]:g}",
        f"{equal.bubble_rate:.1%}",
        f"{measured.bubble_rate:.1%}",
        f"{price:+.1%}",
      )
    )
  columns = ("schedule", "bubble, simulated", "by formula", "of the time", "at 1 : 1.14 : 0.86",
             "one program against many")  # fmt: skip
  text = f"{RANKS_OF_PIPELINE} ranks, {MICROBATCHES} micro-batches; times of a stage are 1, then "
  text += "F : B : W = 1 : 1.14 : 0.86. The last column is the time of one program, in which ranks "
  text += "wait for their neighbours in each tick, over that of a program per rank."
  return f"## Bubbles of pipeline schedules\n\n{text}\n\n{table(columns, rows)}"


def compile_times() -> str:
  """Returns processor seconds of compiling the preset `small` ahead of time for each chip."""
  rows = []
  for topology in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"):
    config = runnable(presets.small(), topology)
    program = compile_ahead(config, topology)
    peak = f"{program.peak_bytes / 2**30:.2f}"
    rows.append([topology, config.mesh.describe(), f"{program.seconds:.0f}", peak])
  columns = ["topology", "mesh", "processor seconds", "peak GiB of a chip"]
  text = "The training step of the preset `small`, on the mesh that `jaxlm plan` finds best."
  return f"## Ahead-of-time compilation\n\n{text}\n\n{table(columns, rows)}"


SECTIONS: tuple[Callable[[], str], ...] = (
  collectives_of_a_step,
  memory_of_a_ring,
  memory_of_schedules,
  bubbles,
  compile_times,
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", type=Path)
  options = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 8)
  body = "\n\n".join(section() for section in SECTIONS)
  publish(report("What is sent and kept on a mesh", body, "jax"), options.write)


if __name__ == "__main__":
  main()
