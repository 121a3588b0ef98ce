"""Counts what parallel programs send and keep, without the machines: collectives, memory, bubbles.

    python -m benchmarks.sharding --write benchmarks/results/sharding_cpu.md

Everything is read from programs that are compiled for 8 virtual CPU devices, from the simulator of
schedules, and from ahead-of-time compilation for TPUs; nothing is timed but the compiler.
"""

import argparse
import collections
import dataclasses
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks.table import publish, report, table
from jaxlm import presets
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, PipelineConfig, TrainConfig, decoder
from jaxlm.run.ahead import compile_ahead, runnable
from jaxlm.run.text import TextTask
from jaxlm.train.lowering import lower_step
from sharding import make_mesh
from sharding.collectives import read_collectives
from sharding.context import ring_attention
from sharding.pipeline import Times, schedules, simulate
from sharding.pipeline.table import coupled_makespan, make_table

MODEL = decoder(V=256, D=64, F=192, N=8, K=4, H=8, layers=4)
LAYOUTS = (
  (MeshConfig(data=8), ""),
  (MeshConfig(data=1, fsdp=8), ""),
  (MeshConfig(data=2, fsdp=2, tensor=2), ""),
  (MeshConfig(data=1, context_ulysses=4), ""),
  (MeshConfig(data=1, context_ring=4), ""),
  (MeshConfig(data=1, fsdp=2, context_ring=2, context_ulysses=2), ""),
  (MeshConfig(data=2, stage=4), "1f1b"),
  (MeshConfig(data=2, stage=4), "zb_h1"),
)
RANKS, MICROBATCHES = 8, 32
MEASURED = Times(forward=1.0, input_gradient=1.14, weight_gradient=0.86)
CHIPS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")


def config_on(mesh: MeshConfig, schedule: str, accumulate: int = 8) -> TrainConfig:
  """Returns a run of 4 layers with rows of 256 tokens on this mesh."""
  config = TrainConfig(
    model=MODEL,
    batch=8 * accumulate,
    accumulate=accumulate,
    data=DataConfig(length=256),
    compute=ComputeConfig(scan="always"),
    mesh=mesh,
  )
  return dataclasses.replace(config, pipeline=PipelineConfig(schedule=schedule or "1f1b"))


def compile_step(config: TrainConfig) -> jax.stages.Compiled:
  """Compiles the training step for as many of the CPU devices as the mesh has."""
  sizes = config.mesh.sizes()
  devices = 1
  for size in sizes.values():
    devices *= size
  task = TextTask(config)
  mesh = make_mesh(config.mesh, jax.devices()[:devices])
  return lower_step(config, task, task.batch_types(), mesh).compile()


def collectives_of_layouts() -> str:
  """Returns the table of what a step of 4 layers and 8 micro-batches sends on each mesh."""
  rows = []
  for mesh, schedule in LAYOUTS:
    step = compile_step(config_on(mesh, schedule))
    found = read_collectives(step.as_text(), mesh.sizes())
    counts = collections.Counter((c.kind, " ".join(c.axes), c.depth) for c in found if c.shape)
    sent = sum((c.times or 1) * c.bytes for c in found) / 2**20
    lines = [
      f"{kind} over {axes}: " + " + ".join(str(counts[kind, axes, d]) for d in range(3))
      for kind, axes in sorted({(kind, axes) for kind, axes, _ in counts})
    ]
    name = f"{mesh.describe()}, {schedule}" if schedule else mesh.describe()
    rows.append((name, "<br>".join(lines), f"{sent:.1f}"))
  return table(("mesh", "arrays outside loops + in one + in two", "MiB a step and device"), rows)


def memory_of_schedules() -> str:
  """Returns the table of what a step of 8 layers on 4 stages allocates, M = 2 P."""
  rows = []
  for name in ("gpipe", "1f1b", "zb_h1", "zb_h2", "zb_v"):
    config = config_on(MeshConfig(data=1, stage=4), name)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, layers=8))
    make = {"1f1b": schedules.one_f_one_b}.get(name) or getattr(schedules, name)
    simulation = simulate(make(4, 8))
    held = max(simulation.peak_activations) / (simulation.schedule.stages // 4)
    memory = compile_step(config).memory_analysis().temp_size_in_bytes
    rows.append((name, f"{held:g}", f"{memory / 2**20:.1f}"))
  return table(("schedule", "activations held, of a rank", "temporary MiB"), rows)


def memory_of_ring() -> str:
  """Returns temporary MiB of ring attention's gradient: its own backward pass, and autodiff's."""
  from sharding.context import ring

  B, T, N, K, H = 1, 4096, 8, 2, 64
  shapes = [(B, T, heads, H) for heads in (N, K, K)]
  own_attend = ring._attend

  def temporary() -> float:
    spec = P(None, "context_ring", None, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context_ring=4), jax.devices()[:4])):
      sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
      args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
      gradient = jax.grad(lambda *qkv: ring_attention(*qkv).sum(), argnums=(0, 1, 2))
      return jax.jit(gradient).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20

  own = temporary()
  ring._attend = lambda *arguments: ring._forward(*arguments)[0]
  try:
    automatic = temporary()
  finally:
    ring._attend = own_attend
  rows = [
    ("its own", f"{own:.0f}", f"{own / automatic:.2f}"),
    ("automatic", f"{automatic:.0f}", "1"),
  ]
  return table(("backward pass", "temporary MiB", "of automatic"), rows)


def bubbles() -> str:
  """Returns simulated bubbles, the closed form where there is one, and the price of one program."""
  t = Times()
  backward = t.input_gradient + t.weight_gradient
  fused = (RANKS - 1) * (t.forward + backward)
  formulas = {
    "gpipe": fused,
    "1f1b": fused,
    "interleaved": fused,
    "zb_h1": (RANKS - 1) * (t.forward + t.input_gradient - t.weight_gradient),
    "zb_h2": (RANKS - 1) * max(0.0, t.forward + t.input_gradient - 2 * t.weight_gradient),
    "zb_v": 0.0,
    "dualpipev": (RANKS - 1) * (t.forward + 2 * backward - 3 * t.weight_gradient),
  }
  makers = {
    "gpipe": schedules.gpipe,
    "1f1b": schedules.one_f_one_b,
    "interleaved": lambda ranks, count: schedules.interleaved(ranks, count, 2),
    "zb_h1": schedules.zb_h1,
    "zb_h2": schedules.zb_h2,
    "zb_v": schedules.zb_v,
    "dualpipev": schedules.dualpipev,
  }
  rows = []
  for name, make in makers.items():
    schedule = make(RANKS, MICROBATCHES)
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
  return table(columns, rows)


def compile_times() -> str:
  """Returns processor seconds of compiling the preset `small` for small slices of each chip."""
  rows = []
  for topology in CHIPS:
    config = runnable(presets.small(), topology)
    program = compile_ahead(config, topology)
    peak = program.peak_bytes / 2**30
    rows.append((topology, config.mesh.describe(), f"{program.seconds:.0f}", f"{peak:.2f}"))
  return table(("topology", "mesh", "processor seconds", "peak GiB of a chip"), rows)


def main() -> None:
  """Writes all tables to the terminal and to --write."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--write", type=Path)
  args = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 8)
  parts = (
    ("What a step sends: 4 layers, 8 micro-batches of 8 rows", collectives_of_layouts),
    ("Memory of schedules: 8 layers on 4 stages, 8 micro-batches", memory_of_schedules),
    ("Ring attention over 4 devices: B 1, T 4096, N 8, K 2, H 64", memory_of_ring),
    (f"Bubbles: {RANKS} ranks, {MICROBATCHES} micro-batches, all times 1", bubbles),
    ("Ahead-of-time compilation of `small`", compile_times),
  )
  sections = []
  for title, make in parts:
    sections.append(f"## {title}\n\n{make()}")
    print(sections[-1], flush=True)
  body = "\n\n".join(sections)
  publish(report("Parallel programs", body, "jax", "libtpu"), args.write)


if __name__ == "__main__":
  main()
