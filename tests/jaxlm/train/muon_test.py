"""Muon: optax's update, the same on every mesh, and without collectives inside its iterations."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.train.muon import scale_by_muon
from sharding import MeshConfig, make_mesh
from sharding.collectives import read_collectives

# two meshes do not divide the stacks; one array has no stack, and stages split another's; arrays
# whose names differ in the number are computed together
SHAPES = {
  "wide/0": (3, 8, 16),
  "tall": (2, 3, 16, 8),
  "single": (8, 8),
  "staged/0": (4, 8, 16),
  "wide/1": (2, 8, 16),
  "staged/1": (1, 8, 16),
}
WIDE = P(None, "fsdp", "tensor")
SPECS = {
  "wide/0": WIDE,
  "tall": P(None, None, "tensor", ("fsdp", "context_ring")),
  "single": P("fsdp", "tensor"),
  "staged/0": P("stage", "fsdp", "tensor"),
  "wide/1": WIDE,
  "staged/1": WIDE,
}
MESHES = {
  "fsdp 8": MeshConfig(data=1, fsdp=8),
  "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
  "fsdp 2, context 2, tensor 2": MeshConfig(data=1, fsdp=2, context_ring=2, tensor=2),
  "stage 2, fsdp 2, tensor 2": MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
}


def draw(seed: int) -> dict[str, jax.Array]:
  random = np.random.default_rng(seed)
  return {
    name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
  }


def shard(tree):
  return {name: jax.device_put(x, SPECS[name]) for name, x in tree.items()}


def directions(optimizer, steps: int, params, place=lambda grads: grads):
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for seed in range(steps):
    direction, state = update(place(draw(seed)), state, params)
  return direction


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, jax.Array]:
  return jax.device_get(directions(scale_by_muon(0.95, 1e-8, 0.2), 3, draw(0)))


def test_one_device_has_the_update_of_optax(on_one_device):
  axes = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), draw(0))
  optimizer = optax.contrib.muon(
    1.0, beta=0.95, consistent_rms=0.2, muon_weight_dimension_numbers=axes
  )
  want = directions(optimizer, 3, draw(0))
  want = jax.tree.map(lambda x: -x, want)  # it includes the learning rate and its sign
  chex.assert_trees_all_close(on_one_device, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_has_the_update_of_one_device(on_one_device, mesh):
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    got = directions(scale_by_muon(0.95, 1e-8, 0.2), 3, shard(draw(0)), shard)
    for name, x in got.items():
      assert x.sharding.spec == SPECS[name]
  chex.assert_trees_all_close(jax.device_get(got), on_one_device, atol=1e-5, rtol=1e-5)


def test_whole_matrices_come_and_go_by_all_to_alls_and_nothing_else_is_sent():
  """Two for each group of arrays and each axis that splits them, none in the iterations.

  There are five groups: the two stacks of "wide" are one, those of "staged" are split differently.
  """
  optimizer = scale_by_muon(0.95, 1e-8, 0.2)
  mesh = make_mesh(MESHES["fsdp 2, context 2, tensor 2"])
  with jax.set_mesh(mesh):
    grads = shard(draw(0))
    compiled = jax.jit(optimizer.update).lower(grads, optimizer.init(grads)).compile()
  sent = read_collectives(compiled.as_text(), mesh.shape)
  assert {(c.kind, c.depth) for c in sent} == {("all-to-all", 0)}
  counts = collections.Counter()
  for c in sent:  # XLA on CPU writes an all-to-all as one array for each device
    counts[c.axes] += 1 / c.group
  assert counts == {("fsdp",): 8, ("fsdp", "context_ring"): 2, ("tensor",): 10}
