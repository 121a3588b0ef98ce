"""The embedding on meshes against one device, and what its compiled program holds and sends."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.embedding import lookup
from sharding import MeshConfig, make_mesh
from sharding.rules import defer_reduction, reduce_gradients, shard

V, D, B, T = 48, 16, 8, 6
MESHES = [
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=1, fsdp=4, tensor=2),
  MeshConfig(data=2, fsdp=2, tensor=2),
]


def inputs():
  """A table, ids among which one is frequent, and a cotangent of the looked-up rows."""
  draw = np.random.default_rng(0)
  w_VD = draw.normal(size=(V, D)).astype(np.float32)
  ids_BT = draw.integers(0, V, (B, T)).astype(np.int32)
  ids_BT[:, ::2] = 5
  return w_VD, ids_BT, draw.normal(size=(B, T, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(3, 4))
def rows_and_gradient(w_VD, ids_BT, dx_BTD, dtype, reduce_dtype="float32"):
  """The rows, and the gradient as the training step takes it: unsummed per device until the end."""

  def summed(w_VD):
    x_BTD = lookup(w_VD, ids_BT, jnp.dtype(dtype), jnp.dtype(reduce_dtype))
    return jnp.sum(x_BTD.astype(jnp.float32) * dx_BTD), x_BTD

  deferred = defer_reduction({"w": w_VD})["w"]
  gradient_VD, x_BTD = jax.grad(summed, has_aux=True)(deferred)
  return x_BTD, reduce_gradients({"w": gradient_VD}, {"w": w_VD})["w"]


def placed_inputs():
  w_VD, ids_BT, dx_BTD = inputs()
  dx_BTD = shard(jnp.asarray(dx_BTD), "batch", "norm_length", None)
  return (
    shard(jnp.asarray(w_VD), "vocab", "embed"),
    shard(jnp.asarray(ids_BT), "batch", None),
    dx_BTD,
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES, ids=MeshConfig.describe)
def test_rows_and_gradient_on_a_mesh_are_those_of_one_device(mesh, dtype):
  want_BTD, want_VD = rows_and_gradient(*inputs(), dtype)
  with jax.set_mesh(make_mesh(mesh)):
    w_VD, *rest = placed_inputs()
    got_BTD, got_VD = rows_and_gradient(w_VD, *rest, dtype)
    assert got_VD.sharding == w_VD.sharding
  chex.assert_type([got_BTD, got_VD], [dtype, jnp.float32])
  np.testing.assert_array_equal(np.asarray(got_BTD, np.float32), np.asarray(want_BTD, np.float32))
  chex.assert_trees_all_close(jax.device_get(got_VD), jax.device_get(want_VD), atol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MESHES[2]], ids=MeshConfig.describe)
def test_ids_outside_the_vocabulary_have_rows_of_nan_and_no_gradient(mesh):
  w_VD, ids_BT, dx_BTD = inputs()
  ids_BT[0, 1], ids_BT[1, 3] = -1, V
  is_known_BT1 = ((ids_BT >= 0) & (ids_BT < V))[..., None]
  float32 = jnp.dtype("float32")

  @jax.jit
  def rows_and_gradient(w_VD, ids_BT, dx_BTD):
    x_BTD, pull = jax.vjp(lambda w_VD: lookup(w_VD, ids_BT, float32, float32), w_VD)
    return x_BTD, *pull(dx_BTD)

  with jax.set_mesh(make_mesh(mesh)):
    placed = shard(jnp.asarray(w_VD), "vocab", "embed"), shard(jnp.asarray(ids_BT), "batch", None)
    got = rows_and_gradient(*placed, shard(jnp.asarray(dx_BTD), "batch", "norm_length", None))
  x_BTD, gradient_VD = jax.device_get(got)
  np.testing.assert_array_equal(x_BTD, np.where(is_known_BT1, w_VD[ids_BT % V], np.nan))
  want_VD = np.zeros_like(w_VD)
  np.add.at(want_VD, ids_BT % V, np.where(is_known_BT1, dx_BTD, 0))
  chex.assert_trees_all_close(gradient_VD, want_VD, atol=1e-5)


def test_rows_are_those_of_the_table():
  w_VD, ids_BT, dx_BTD = inputs()
  x_BTD, gradient_VD = rows_and_gradient(w_VD, ids_BT, dx_BTD, "float32")
  np.testing.assert_array_equal(x_BTD, w_VD[ids_BT])
  want_VD = np.zeros_like(w_VD)
  np.add.at(want_VD, ids_BT, dx_BTD)
  chex.assert_trees_all_close(np.asarray(gradient_VD), want_VD, atol=1e-5)


def test_gradients_of_a_frequent_token_add_up_in_float32():
  """In bfloat16 a sum of ones would stop at 256."""
  ids_BT = jnp.zeros((2, 512), jnp.int32)
  bfloat16 = jnp.dtype("bfloat16")
  looked_up = functools.partial(lookup, ids_BT=ids_BT, dtype=bfloat16, reduce_dtype=bfloat16)
  gradient = jax.jit(jax.grad(lambda w_VD: looked_up(w_VD).sum()))
  gradient_VD = np.asarray(gradient(np.ones((4, 2), np.float32)))
  np.testing.assert_array_equal(gradient_VD[0], [1024, 1024])


@pytest.mark.parametrize("mesh", MESHES[1:], ids=MeshConfig.describe)
def test_fsdp_sends_the_rows_gradients_in_reduce_dtype_and_sums_them_in_float32(mesh):
  w_VD, ids_BT, dx_BTD = inputs()
  rounded_BTD = dx_BTD.astype(jnp.bfloat16).astype(np.float32)
  want_BTD, want_VD = rows_and_gradient(w_VD, ids_BT, rounded_BTD, "float32")
  with jax.set_mesh(make_mesh(mesh)):
    lowered = rows_and_gradient.lower(*placed_inputs(), "float32", "bfloat16")
    got_BTD, got_VD = rows_and_gradient(*placed_inputs(), "float32", "bfloat16")
  sent = re.findall(r"all_to_all.*-> tensor<[\dx]*x(\w+)>", lowered.as_text())
  assert sent == ["f32", "bf16"]  # rows, then their gradients
  np.testing.assert_array_equal(got_BTD, want_BTD)
  chex.assert_trees_all_close(jax.device_get(got_VD), jax.device_get(want_VD), atol=1e-5)
  exact_VD = rows_and_gradient(w_VD, ids_BT, dx_BTD, "float32")[1]
  assert np.abs(got_VD - exact_VD).max() > 1e-3


@pytest.mark.parametrize("mesh", MESHES[1:], ids=MeshConfig.describe)
def test_no_device_holds_the_whole_table(mesh):
  """Neither the table nor its gradient, in any type; the rows travel in the compute type."""
  with jax.set_mesh(make_mesh(mesh)):
    text = rows_and_gradient.lower(*placed_inputs(), "bfloat16").compile().as_text()
  assert not re.findall(rf"\w+\[{V},{D}\]", text)
  assert not re.findall(rf"\w+\[{V * D}\]", text)
  sizes = mesh.resolve(8)
  shard_shape = f"f32[{V // sizes['tensor']},{D // sizes['fsdp']}]"
  assert shard_shape in text
