"""Attention of a model on meshes whose axes it cannot use: refused when traced, never wrong."""

# B batch, T positions
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import presets
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh

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
@pytest.mark.parametrize("apply", [MODEL.apply, apply_cached], ids=["whole", "cached"])
def test_a_model_refuses_a_spread_sequence_when_traced(apply, axis, mesh):
  with jax.set_mesh(make_mesh(mesh)):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    with pytest.raises(UserError, match=rf"its T=8 is spread over mesh axis {axis}=2"):
      jax.eval_shape(apply, params, jax.ShapeDtypeStruct((2, 8), np.int32))


@pytest.mark.parametrize("axis, mesh", CONTEXT)
def test_a_training_step_refuses_it_too(axis, mesh):
  task = TextTask(CONFIG)
  with jax.set_mesh(make_mesh(mesh)):
    state = jax.eval_shape(lambda: init_state(CONFIG, task))
    ids_BT = jax.ShapeDtypeStruct((CONFIG.batch, CONFIG.data.length), np.int32)
    weights_BT = jax.ShapeDtypeStruct(ids_BT.shape, np.float32)
    batch = Batch(ids_BT, ids_BT, weights_BT)
    with pytest.raises(UserError, match=rf"its T=64 is spread over mesh axis {axis}=2"):
      jax.eval_shape(make_train_step(CONFIG, task), state, batch)


@pytest.mark.slow
def test_one_position_is_not_spread_and_decodes():
  """A length of 1 stays whole, so that decoding one position is right on such a mesh."""
  ids_BT = np.array([[3], [7]], np.int32)
  apply = jax.jit(functools.partial(apply_cached, start=4))
  params = jax.jit(MODEL.init)(jax.random.key(0))
  want = apply(params, ids_BT)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context_ring=2))):
    got = apply(jax.jit(MODEL.init)(jax.random.key(0)), ids_BT)
  chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=1e-5)
