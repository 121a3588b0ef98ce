"""Training on rows that lie over several devices: what is sent, and that nothing else changes."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
  decoder,
  revise,
)
from jaxlm.run import train
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from sharding import make_mesh
from sharding.collectives import read_collectives

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

RING, ULYSSES = "context_ring", "context_ulysses"
MESH = MeshConfig(data=2, context_ring=2, context_ulysses=2)
# no dimension of a weight or an activation but T is a multiple of the whole length or of a half
LENGTH = 24
CONFIG = TrainConfig(
  batch=16,
  accumulate=4,
  model=decoder(V=80, D=16, F=40, N=4, K=2, H=8, layers=4),
  compute=ComputeConfig(scan="always"),
  data=DataConfig(length=LENGTH),
  mesh=MESH,
)


@pytest.mark.slow
def test_a_step_sends_what_its_layers_need_and_each_gradient_once(lower_step):
  found = read_collectives(lower_step(CONFIG).compile().as_text(), MESH.resolve(8))
  counts = collections.Counter((c.kind, c.axes, c.depth) for c in found if c.shape)

  # A layer, in the loops over micro-batches and layers: four all-to-alls and as many backward, each
  # written as an array for each of two devices; k and v one hop, again in the backward pass, and dk
  # and dv two hops.
  assert counts["all-to-all", (ULYSSES,), 2] == 2 * (4 + 4)
  assert counts["collective-permute", (RING,), 2] == 2 + 2 + 4
  # Of states, a micro-batch sends the embedding's rows, forward and backward, and nothing more.
  states = {key: n for key, n in counts.items() if key[0] in ("all-to-all", "collective-permute")}
  assert states.pop(("all-to-all", (RING, ULYSSES), 1)) == 4 * (1 + 1)
  assert set(states) == {("all-to-all", (ULYSSES,), 2), ("collective-permute", (RING,), 2)}

  # What is gathered or summed inside the loops are weights, which lie over the sequence's axes as
  # over fsdp, and ids, for the embedding.
  with jax.set_mesh(make_mesh(MESH)):
    params = jax.eval_shape(lambda: init_state(CONFIG, TextTask(CONFIG))).params
  matrices = {x.shape[-2:] for x in jax.tree.leaves(params) if x.ndim > 1}
  for c in found:
    if c.depth and c.shape and c.kind in ("all-gather", "all-reduce"):
      assert c.shape in matrices or (c.dtype, c.depth) == ("s32", 1), c
    if c.kind != "all-to-all" and c.dtype != "s32":
      assert LENGTH not in c.shape, c

  # each gradient crosses data once, outside of all loops
  crossing = [c for c in found if "data" in c.axes and c.shape]
  assert {c.depth for c in crossing} == {0}
  local = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(params)]
  assert collections.Counter(c.shape for c in crossing) == collections.Counter(local)


@pytest.mark.slow
def test_a_run_on_such_a_mesh_is_the_run_of_one_device(corpus, tmp_path):
  """By mesh sizes alone, evaluation included."""
  config = TrainConfig(
    steps=2,
    batch=4,
    eval_every=1,
    eval_batches=1,
    model=revise(CONFIG.model, V=256, layers=2),
    compute=CONFIG.compute,
    data=DataConfig(source=str(corpus), length=32, holdout=0.2),
    optimizer=OptimizerConfig(warmup=1, learning_rate=1e-2, eps=1e-4),
  )
  meshes = {"one": MeshConfig(data=1), "spread": MeshConfig(data=1, **{RING: 2, ULYSSES: 2})}
  folders = {name: RunFolder(tmp_path / name) for name in meshes}
  for name, mesh in meshes.items():
    train(dataclasses.replace(config, run=str(folders[name].path), mesh=mesh))
  for records, keys in (("metrics", ("loss", "grad_norm")), ("evals", ("heldout_loss",))):
    one, spread = (list(read_records(getattr(folder, records))) for folder in folders.values())
    for key in keys:
      want = [record[key] for record in one]
      np.testing.assert_allclose([record[key] for record in spread], want, rtol=1e-4)
