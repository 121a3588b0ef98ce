"""Loading onto meshes, and training there: the same numbers as on one device."""

import chex
import jax
import numpy as np
import pytest

from jaxlm.interop import huggingface
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MESHES = {
  "data": MeshConfig(data=8),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "tensor": MeshConfig(data=1, fsdp=4, tensor=2),
}


def batch(c):
  """Eight rows, so that every mesh divides them."""
  return np.concatenate([np.roll(c.ids_BT, shift, axis=1) for shift in range(4)])


def largest_error(got, want):
  """Of any leaf, relative to that leaf's largest entry."""
  errors = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max(),
    got,
    want,
  )
  return max(jax.tree.leaves(errors))


def assert_mesh_equals_one_device(c, folder, mesh, train_pass):
  ids_BT = batch(c)
  config, params = huggingface.load(folder)
  logits_BTV, loss, grads = train_pass(config, params, ids_BT)
  with jax.set_mesh(make_mesh(mesh)):
    config, sharded = huggingface.load(folder)
    chex.assert_trees_all_equal(sharded, params)
    got_BTV, got_loss, got_grads = train_pass(config, sharded, ids_BT)
    placed = jax.tree.map(lambda g, w: g.sharding == w.sharding, got_grads, sharded)
  assert all(jax.tree.leaves(placed))
  np.testing.assert_allclose(got_BTV, logits_BTV, rtol=0, atol=1e-4)
  assert float(got_loss) == pytest.approx(float(loss), abs=1e-5)
  assert largest_error(got_grads, grads) < 2e-5
  np.testing.assert_allclose(np.asarray(got_BTV)[: len(c.ids_BT)], c.logits_BTV, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_family_trains_sharded_as_on_one_device(family, mesh, train_pass):
  assert_mesh_equals_one_device(family, family.folder, MESHES[mesh], train_pass)


@pytest.mark.parametrize("mesh", MESHES)
def test_loading_splits_the_weights_and_keeps_the_values(any_checkpoint, mesh):
  c = any_checkpoint
  if mesh == "tensor" and c.config.pattern[0].mixer.K % 2:
    with (
      pytest.raises(ValueError, match="not divisible by mesh axes"),
      jax.set_mesh(make_mesh(MESHES[mesh])),
    ):
      huggingface.load(c.folder)
    return
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    _, params = huggingface.load(c.folder)
  chex.assert_trees_all_equal(params, c.params)
  w_LDF = params["stacks"]["0"]["0"]["feedforward"]["gate"]["weight"]
  shard = w_LDF.addressable_shards[0].data.shape
  parts = {"data": (1, 1), "fsdp": (8, 1), "tensor": (4, 2)}[mesh]
  assert shard == (
    w_LDF.shape[0],
    c.config.D // parts[0],
    c.config.pattern[0].feedforward.F // parts[1],
  )


def test_saving_from_a_mesh_gives_the_same_file(checkpoint, tmp_path):
  c = checkpoint("qwen3")
  with jax.set_mesh(make_mesh(MESHES["tensor"])):
    config, params = huggingface.load(c.folder)
    huggingface.save(tmp_path / "inside", config, params)
  huggingface.save(tmp_path / "outside", config, params)
  huggingface.save(tmp_path / "single", c.config, c.params)
  written = {
    name: (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("inside", "outside", "single")
  }
  assert written["inside"] == written["outside"] == written["single"]


def test_casting_while_loading_onto_a_mesh(checkpoint):
  c = checkpoint("qwen2")
  with jax.set_mesh(make_mesh(MESHES["fsdp"])):
    config, params = huggingface.load(c.folder, dtype="bfloat16")
  assert config == c.config
  rounded = jax.tree.map(lambda w: w.astype("bfloat16"), c.params)
  chex.assert_trees_all_equal(params, rounded)
