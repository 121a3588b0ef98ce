"""Delta attention on Explicit meshes: rows and heads are split, other spreads are refused."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.delta_attention import delta_attention
from sharding.collectives import read_collectives

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

AXES = ("data", "tensor")


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  ids_BT = np.sort(rng.integers(0, 3, (4, 24)), axis=1).astype(np.int32)
  return dict(
    q=draw(4, 24, 2, 4),
    k=draw(4, 24, 2, 4),
    v=draw(4, 24, 4, 6),
    decay=draw(4, 24, 4, 4),
    beta=draw(4, 24, 4),
    state=draw(4, 4, 4, 6),
    ids=ids_BT,
    a_log=draw(4),
    bias=draw(4, 4),
  )


SPECS = dict.fromkeys(("q", "k", "v", "decay"), ("data", None, "tensor", None)) | dict(
  beta=("data", None, "tensor"),
  state=("data", "tensor", None, None),
  ids=("data", None),
  a_log=("tensor",),
  bias=("tensor", None),
)


@jax.jit
def loss_and_gradients(x):
  def loss(x):
    o_BTNV, state_BNKV = delta_attention(
      x["q"],
      x["k"],
      x["v"],
      decay=x["decay"],
      erase=x["beta"],
      gate="softplus",
      a_log_N=x["a_log"],
      dt_bias=x["bias"],
      initial_state_BNKV=x["state"],
      segment_ids_BT=x["ids"],
      l2norm=True,
      return_state=True,
    )
    return jnp.sum(jnp.sin(o_BTNV)) + jnp.sum(jnp.sin(state_BNKV))

  return jax.value_and_grad(loss, allow_int=True)(x)


def spread(data, tensor, **specs):
  kinds, devices = (AxisType.Explicit,) * 2, jax.devices()[: data * tensor]
  mesh = jax.make_mesh((data, tensor), AXES, axis_types=kinds, devices=devices)
  return mesh, {
    name: jax.device_put(x, jax.NamedSharding(mesh, P(*(SPECS | specs)[name])))
    for name, x in inputs().items()
  }


@pytest.mark.slow
@pytest.mark.parametrize("data, tensor", [(2, 2), (4, 1)])
def test_rows_and_heads_are_split_without_communication(data, tensor):
  want, want_gradients = loss_and_gradients(inputs())
  mesh, arrays = spread(data, tensor)
  with jax.set_mesh(mesh):
    loss, gradients = jax.block_until_ready(loss_and_gradients(arrays))
    program = loss_and_gradients.lower(arrays).compile().as_text()
  chex.assert_trees_all_close(loss, want, rtol=1e-5)
  for name in set(gradients) - {"ids"}:
    chex.assert_trees_all_close(gradients[name], want_gradients[name], atol=1e-4)
  kinds = {collective.kind for collective in read_collectives(program, dict(mesh.shape))}
  assert kinds <= {"all-reduce"}  # of the loss and of the gate's parameters


@pytest.mark.parametrize(
  "specs, error, message",
  [
    (dict(k=(None, "data", None, None)), UnsupportedError, "k_BTHK=.*its T=24 is spread over"),
    (dict(v=(None, None, None, "data")), UnsupportedError, "v_BTNV=.*its V=6 is spread over"),
    (dict(state=(None, None, "data", None)), UnsupportedError, "initial_state.*its K=4 is spread"),
    (dict(v=(None, None, AXES, None)), UserError, "q_BTHK=.*its H=2 heads cannot be split"),
  ],
)
def test_what_cannot_be_split_is_refused_when_traced(specs, error, message):
  mesh, arrays = spread(2, 2, **specs)
  with jax.set_mesh(mesh), pytest.raises(error, match=message):
    jax.eval_shape(loss_and_gradients, arrays)
