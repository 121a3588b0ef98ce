"""Training on rows that lie over several devices: what is sent, and that nothing else changes."""

import collections
import dataclasses
import math

import jax
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
from jaxlm.run import resume, train
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from sharding import make_mesh
from sharding.collectives import read_collectives

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
  kinds = {c.kind for c in found if set(c.axes) & {RING, ULYSSES} and c.depth == 2}
  assert kinds == {"all-to-all", "collective-permute", "all-gather", "all-reduce"}

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
def test_on_tpu_ulysses_runs_splash_and_a_ring_permutes_in_the_layer_loop(lower_step, tpu_devices):
  model = revise(CONFIG.model, D=128, F=256, H=64, V=384)
  config = dataclasses.replace(CONFIG, model=model, data=DataConfig(length=512), accumulate=1)
  ulysses = dataclasses.replace(config, mesh=MeshConfig(data=4, context_ulysses=2))
  text = lower_step(ulysses, tpu_devices).compile().as_text()
  assert "splash" in text
  sent = read_collectives(text, ulysses.mesh.resolve(8))
  counts = collections.Counter((c.kind, c.axes, c.depth) for c in sent)
  assert counts["all-to-all", (ULYSSES,), 1] == 4 + 4

  ring = dataclasses.replace(config, mesh=MeshConfig(data=4, context_ring=2))
  sent = read_collectives(lower_step(ring, tpu_devices).compile().as_text(), ring.mesh.resolve(8))
  counts = collections.Counter((c.kind, c.axes, c.depth) for c in sent)
  print(counts)
  assert counts["collective-permute", (RING,), 1] == 2 + 2 + 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_a_run_on_such_a_mesh_is_the_run_of_one_device(corpus, tmp_path, layout):
  """By mesh sizes alone, evaluation included; it goes on with the axes the other way round."""
  config = TrainConfig(
    steps=4,
    batch=4,
    save_every=2,
    eval_every=2,
    eval_batches=1,
    model=CONFIG.model,
    data=DataConfig(source=str(corpus), length=32, layout=layout, holdout=0.2),
    optimizer=OptimizerConfig(warmup=1, learning_rate=1e-2, eps=1e-4),
  )

  def run(name: str, mesh: MeshConfig):
    path = str(tmp_path / name)
    first = dataclasses.replace(config, run=path, mesh=mesh)
    train(dataclasses.replace(first, stop_after=""))
    return RunFolder(tmp_path / name)

  want, got = run("one", MeshConfig(data=1)), run("spread", dataclasses.replace(MESH, data=1))
  for file in ("metrics", "evaluation"):
    pairs = zip(read_records(getattr(want, file)), read_records(getattr(got, file)), strict=True)
    for one, spread in pairs:
      for key in ("loss", "grad_norm", "heldout_loss"):
        assert math.isclose(one.get(key, 0), spread.get(key, 0), rel_tol=1e-4), (one, spread)
  other = MeshConfig(data=1, context_ring=4, tensor=2)
  result = resume(got.path, dataclasses.replace(config, run=str(got.path), mesh=other, steps=5))
  straight = resume(want.path, steps=5)
  assert result.metrics["loss"] == pytest.approx(straight.metrics["loss"], rel=1e-4)
