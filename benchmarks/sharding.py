"""What programs on a mesh send and keep in memory, from the compiler alone: nothing is timed.

    python -m benchmarks.sharding --write benchmarks/results/sharding_cpu.md

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
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, decoder
from jaxlm.data.packing import Batch
from jaxlm.run.text import TextTask
from jaxlm.train.lowering import lower_step
from sharding import make_mesh
from sharding.collectives import read_collectives
from sharding.context import hybrid_attention, ring
from sharding.context.order import ORDERS

LAYOUTS = (
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=1, context_ring=8),
  MeshConfig(data=1, context_ulysses=8),
  MeshConfig(data=1, context_ring=4, context_ulysses=2),
  MeshConfig(data=1, fsdp=2, context_ring=2, tensor=2),
)
STEP = TrainConfig(
  batch=32,
  accumulate=2,
  model=decoder(V=512, D=128, F=352, N=8, K=4, H=16, layers=4),
  compute=ComputeConfig(scan="always"),
  data=DataConfig(length=256, layout="packed"),
)
RING_LENGTH, RANKS = 4096, 4


def collectives_of_a_step() -> str:
  """Returns what a training step sends, per layout: each kind over each set of axes."""
  rows = []
  for mesh in LAYOUTS:
    config = dataclasses.replace(STEP, mesh=mesh)
    shape = (config.batch, config.data.length)
    ids, weights = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.float32)
    batch = Batch(ids, ids, weights, ids, ids)
    lowered = lower_step(config, TextTask(config), batch, make_mesh(mesh))
    arrays: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    for c in read_collectives(lowered.compile().as_text(), mesh.resolve(8)):
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


SECTIONS: tuple[Callable[[], str], ...] = (collectives_of_a_step, memory_of_a_ring)


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
