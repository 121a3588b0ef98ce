"""Attention of a model whose rows lie over several devices: right, or refused when traced."""

# B batch, T positions
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import presets
from jaxlm.config import RopeConfig, revise
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh
from sharding.context.order import permutation

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CONFIG = presets.micro()
MODEL = Transformer(CONFIG.model)
CONTEXT = [
  ("context_ring", MeshConfig(data=1, context_ring=2)),
  ("context_ulysses", MeshConfig(data=1, context_ulysses=2)),
  ("context_ring", MeshConfig(data=1, fsdp=2, context_ring=2, tensor=1)),
]


def apply_cached(params, ids_BT, start=0):
  B, T = ids_BT.shape
  positions_BT = jnp.broadcast_to(start + jnp.arange(T)[None], (B, T))
  cache = MODEL.init_cache(B, 16)
  return MODEL.apply(params, ids_BT, positions=positions_BT, cache=cache)[0]


@pytest.mark.parametrize("axis, mesh", CONTEXT)
def test_a_cache_refuses_a_spread_sequence_when_traced(axis, mesh):
  with jax.set_mesh(make_mesh(mesh)):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    with pytest.raises(UserError, match=rf"its T=8 is spread over mesh axis {axis}=2"):
      jax.eval_shape(apply_cached, params, jax.ShapeDtypeStruct((2, 8), np.int32))


@pytest.mark.parametrize(
  "mesh, length, message",
  [
    (MeshConfig(data=1, context_ulysses=4), 64, r"N=2: query heads .* context_ulysses=4"),
    (MeshConfig(data=1, context_ring=4), 60, r"T=60: must be a multiple of 8 .* a ring of 4"),
    (MeshConfig(data=1, context_ulysses=2), 63, r"axis 'length' of size 63 .* of 2 devices"),
  ],
)
def test_a_training_step_refuses_what_cannot_be_split_with_both_numbers(mesh, length, message):
  task = TextTask(CONFIG)
  with jax.set_mesh(make_mesh(mesh)):
    state = jax.eval_shape(lambda: init_state(CONFIG, task))
    ids_BT = jax.ShapeDtypeStruct((CONFIG.batch, length), np.int32)
    weights_BT = jax.ShapeDtypeStruct(ids_BT.shape, np.float32)
    with pytest.raises(UserError, match=message):
      batch = Batch(ids_BT, ids_BT, weights_BT)
      jax.eval_shape(make_train_step(CONFIG, task), state, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
  "order, rope",
  [
    ("contiguous", RopeConfig()),
    ("zigzag", RopeConfig(scaling="dynamic", factor=2.0, original_length=8)),
  ],
)
def test_logits_of_spread_rows_come_in_their_order(order, rope):
  """By default positions are those of the ring's order."""
  model = Transformer(revise(CONFIG.model, rope=rope))
  ids_BT = np.random.default_rng(0).integers(0, 250, (2, 16)).astype(np.int32)
  columns_T = permutation(order, 16, 2)
  want = jax.jit(model.apply)(model.init(jax.random.key(0)), ids_BT)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context_ring=2, context_ulysses=2))):
    params = jax.jit(model.init)(jax.random.key(0))
    got = jax.jit(functools.partial(model.apply, order=order))(params, ids_BT[:, columns_T])
  chex.assert_trees_all_close(np.asarray(got), np.asarray(want)[:, columns_T], atol=1e-5)


@pytest.mark.slow
def test_one_position_is_not_spread_and_decodes():
  """A length of 1 stays whole, so that decoding one position is right on such a mesh."""
  ids_BT = np.array([[3], [7]], np.int32)
  apply = jax.jit(functools.partial(apply_cached, start=4))
  params = MODEL.init(jax.random.key(0))
  want = apply(params, ids_BT)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context_ring=2))):
    got = apply(jax.jit(MODEL.init)(jax.random.key(0)), ids_BT)
  chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=1e-5)
