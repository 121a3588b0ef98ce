"""On every mesh, loss and each gradient equal one device's."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  PipelineConfig,
  TrainConfig,
  decoder,
  revise,
)
from jaxlm.data.packing import Batch, join, pack
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from jaxlm.train.accumulate import accumulated_gradients
from jaxlm.train.pipelined import pipelined_gradients
from sharding import make_mesh
from sharding.batches import globalize

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MESHES = [
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=1, tensor=2, fsdp=4),
  MeshConfig(data=2, fsdp=2, tensor=2),
]
# every two of ring, Ulysses, fsdp and tensor; a ring with a loop; two key heads on four devices
CONTEXT_MESHES = [
  MeshConfig(data=1, fsdp=2, context_ring=2, context_ulysses=2),
  MeshConfig(data=1, context_ring=2, context_ulysses=2, tensor=2),
  MeshConfig(data=2, context_ulysses=4),
  MeshConfig(data=1, context_ring=4, tensor=2),
]
SCANNED = TrainConfig(
  batch=16,
  accumulate=2,
  z_loss=1e-2,
  model=decoder(
    V=32,
    D=16,
    F=24,
    N=4,
    K=2,
    H=4,
    layers=4,
    windows=(4, None),
    cap=20.0,
  ),
  compute=ComputeConfig(scan="always", remat="full"),
  data=DataConfig(length=16, layout="packed"),
)
ALIKE = dataclasses.replace(
  SCANNED,
  accumulate=4,
  model=dataclasses.replace(
    revise(SCANNED.model, tied=True), layers=6, pattern=SCANNED.model.pattern[:1]
  ),
  compute=ComputeConfig(remat="full"),
)
SMALL = dataclasses.replace(
  ALIKE,
  accumulate=2,
  model=dataclasses.replace(ALIKE.model, layers=2),
  compute=ComputeConfig(),
)
UNROLLED = dataclasses.replace(
  SCANNED,
  accumulate=1,
  model=revise(SCANNED.model, layers=2, tied=True),
  compute=ComputeConfig(scan="never"),
)


@functools.cache
def packed_batch() -> Batch:
  """Rows of several segments with different amounts of padding, and one row of padding alone."""
  draw = np.random.default_rng(0)
  documents = [draw.integers(1, 32, size) for size in draw.integers(1, 10, 40)]
  tokens_S, borders_D = join(documents, eos=0, dtype=np.dtype(np.int64))
  rows = pack(tokens_S, borders_D, 16)
  batch = rows.build(np.arange(len(rows) - 15, len(rows) + 1))
  tokens_B = batch.weights_BT.sum(1)
  assert tokens_B[-1] == 0 and len(set(tokens_B)) > 3 and batch.segment_ids_BT.max() > 2
  return batch


def loss_and_gradients(config, params, batch):
  task = TextTask(config)

  def objective(params, batch, key):
    return task.objective(params, {}, batch, key)

  arguments = (objective, params, batch, jax.random.key(0))
  if config.mesh.stage == 1:
    grads, terms = accumulated_gradients(*arguments, config.accumulate)
  else:
    grads, terms = pipelined_gradients(config, task.stages(), *arguments)
  return {name: (term.mean(), term.den) for name, term in terms.items()}, grads


@functools.cache
def run(config: TrainConfig):
  """Returns (parameters, (terms, gradients)) as numpy, whether these lie alike, and the program."""
  with jax.set_mesh(make_mesh(config.mesh)):
    params = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config)).params
    batch = globalize(packed_batch(), config.batch)
    step = jax.jit(loss_and_gradients, static_argnums=0).lower(config, params, batch).compile()
    results = step(params, batch)
    alike = jax.tree.map(lambda g, w: g.sharding.spec == w.sharding.spec, results[1], params)
    return jax.device_get((params, results)), alike, step


def check_against_one_device(config: TrainConfig):
  """Compares loss and gradients; returns parameters and program of the config's own mesh."""
  one = dataclasses.replace(config, mesh=MeshConfig(data=1), pipeline=PipelineConfig())
  (want_params, (want_terms, want_grads)), _, _ = run(one)
  (params, (terms, grads)), alike, program = run(config)
  chex.assert_trees_all_equal(params, want_params)  # a seed gives the same weights everywhere
  assert all(jax.tree.leaves(alike))
  chex.assert_trees_all_close(terms, want_terms, rtol=1e-6)
  assert terms["loss"][1] == packed_batch().weights_BT.sum()
  sizes = [np.abs(grad).max() for grad in jax.tree.leaves(want_grads)]
  assert min(sizes) > 1e-6  # every parameter has a gradient
  scales = jax.tree.map(lambda grad: max(1, np.abs(grad).max()), want_grads)
  grads, want_grads = (jax.tree.map(np.divide, x, scales) for x in (grads, want_grads))
  chex.assert_trees_all_close(grads, want_grads, rtol=0, atol=1e-5)
  return params, program


def cases(name: str, config: TrainConfig, meshes, marks=pytest.mark.slow) -> list:
  return [
    pytest.param(config, mesh, id=f"{name}, {mesh.describe()}", marks=marks) for mesh in meshes
  ]


@pytest.mark.parametrize(
  "config, mesh",
  cases("scanned", SCANNED, MESHES + CONTEXT_MESHES)
  + cases("unrolled, tied", UNROLLED, MESHES[1::2])
  + cases("small", SMALL, MESHES[3:], marks=()),
)
def test_loss_and_every_gradient_equal_one_devices(config, mesh):
  check_against_one_device(dataclasses.replace(config, mesh=mesh))


@pytest.mark.slow
def test_fsdp_reduces_in_the_stated_type_and_gradients_differ_by_its_rounding_alone():
  """In bfloat16 the sum over 8 devices of what each computed exactly is off by about 2^-8 of it."""
  exactly = dataclasses.replace(UNROLLED, mesh=MeshConfig(data=1, fsdp=8))
  halved = dataclasses.replace(
    exactly, compute=dataclasses.replace(exactly.compute, reduce_dtype="bfloat16")
  )
  (_, (want_terms, want)), _, _ = run(exactly)
  (_, (terms, grads)), _, _ = run(halved)
  assert terms["loss"] == want_terms["loss"]  # the forward pass is the same
  differs = False
  for (path, got), exact in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want)):
    largest = np.abs(exact).max()
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(got, exact, rtol=0, atol=2**-7 * largest, err_msg=name)
    differs |= np.abs(got - exact).max() > 2**-12 * largest
  assert differs
