"""On every mesh, loss and each gradient equal one device's."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, decoder, revise
from jaxlm.data.packing import Batch, join, pack
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from jaxlm.train.accumulate import accumulated_gradients
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
  def objective(params, batch, key):
    return TextTask(config).objective(params, {}, batch, key)

  key = jax.random.key(0)
  grads, terms = accumulated_gradients(objective, params, batch, key, config.accumulate)
  loss = terms["loss"]
  return loss.mean(), loss.den, grads


@functools.cache
def run(config: TrainConfig, mesh: MeshConfig):
  """Returns parameters and (loss, tokens, gradients) on a mesh, as numpy.

  Also returns whether gradients lie like their parameters.
  """
  with jax.set_mesh(make_mesh(mesh)):
    params = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config)).params
    results = jax.jit(loss_and_gradients, static_argnums=0)(
      config, params, globalize(packed_batch(), config.batch)
    )
    alike = jax.tree.map(lambda g, w: g.sharding.spec == w.sharding.spec, results[2], params)
    return jax.device_get((params, results)), alike


QUICK = (MESHES[3],)


def cases(name: str, config: TrainConfig, meshes, quick) -> list:
  return [
    pytest.param(
      config, mesh, id=f"{name}, {mesh.describe()}", marks=() if mesh in quick else pytest.mark.slow
    )
    for mesh in meshes
  ]


@pytest.mark.parametrize(
  "config, mesh",
  cases("scanned", SCANNED, MESHES + CONTEXT_MESHES, QUICK)
  + cases("unrolled, tied", UNROLLED, MESHES[1::2], ()),
)
def test_loss_and_every_gradient_equal_one_devices(config, mesh):
  (want_params, (want_loss, want_tokens, want_grads)), _ = run(config, MeshConfig(data=1))
  (params, (loss, tokens, grads)), alike = run(config, mesh)
  chex.assert_trees_all_equal(params, want_params)  # a seed gives the same weights everywhere
  assert all(jax.tree.leaves(alike))
  assert tokens == want_tokens == packed_batch().weights_BT.sum()
  assert loss == pytest.approx(want_loss, rel=1e-6)

  sizes = [np.abs(grad).max() for grad in jax.tree.leaves(want_grads)]
  assert min(sizes) > 1e-6  # every parameter has a gradient
  scales = jax.tree.map(lambda grad: max(1, np.abs(grad).max()), want_grads)
  grads, want_grads = (jax.tree.map(np.divide, x, scales) for x in (grads, want_grads))
  chex.assert_trees_all_close(grads, want_grads, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_fsdp_reduces_in_the_stated_type_and_gradients_differ_by_its_rounding_alone():
  """In bfloat16 the sum over 8 devices of what each computed exactly is off by about 2^-8 of it."""
  mesh = MeshConfig(data=1, fsdp=8)
  halved = dataclasses.replace(
    UNROLLED, compute=dataclasses.replace(UNROLLED.compute, reduce_dtype="bfloat16")
  )
  (_, (want_loss, _, want)), _ = run(UNROLLED, mesh)
  (_, (loss, _, grads)), _ = run(halved, mesh)
  assert loss == want_loss  # the forward pass is the same
  differs = False
  for (path, got), exact in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want)):
    largest = np.abs(exact).max()
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(got, exact, rtol=0, atol=2**-7 * largest, err_msg=name)
    differs |= np.abs(got - exact).max() > 2**-12 * largest
  assert differs
