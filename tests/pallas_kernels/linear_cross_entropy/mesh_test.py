"""The vocabulary split over a mesh axis: Explicit meshes and shard_map against one device."""

# N tokens, D model, V vocabulary
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from sharding.collectives import read_collectives

OPTIONS = dict(softcap=3.0, temperature=0.7, z_loss=0.1, label_smoothing=0.2)
SPECS = (P("data", None), P("tensor", None), P("tensor"), P("data"))


@functools.cache
def numbers():
  rng = np.random.default_rng(0)
  labels_N = rng.integers(0, 40, 16).astype(np.int32)
  labels_N[3] = -100
  return (
    *(rng.normal(size=shape).astype(np.float32) for shape in ((16, 6), (40, 6), (40,))),
    labels_N,
  )


def inputs():
  return tuple(map(jnp.asarray, numbers()))


def loss(e_ND, c_VD, bias_V, labels_N, **options):
  returned = linear_cross_entropy(e_ND, c_VD, labels_N, bias_V=bias_V, **OPTIONS, **options)
  return jnp.sum(returned[0] + returned[1]) if isinstance(returned, tuple) else jnp.sum(returned)


def spread(mesh, arrays):
  return tuple(
    jax.reshard(array, jax.NamedSharding(mesh, spec)) for array, spec in zip(arrays, SPECS)
  )


def assert_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "options", [dict(), dict(reduction="none", return_lse=True)], ids=["scalar", "per token"]
)
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)], ids=str)
def test_explicit_mesh(shape, options):
  mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  function = jax.value_and_grad(functools.partial(loss, implementation="xla", **options), (0, 1, 2))
  with jax.set_mesh(mesh):
    got = jax.jit(function)(*spread(mesh, inputs()))
    assert [jax.typeof(g).sharding.spec for g in got[1]] == list(SPECS[:3])
  assert_same(got, jax.jit(function)(*inputs()))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_shard_map(implementation):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  options = dict(reduction="sum", implementation=implementation)

  def local(*arrays):
    return jax.lax.psum(loss(*arrays, axis_name="tensor", **options), "data")

  with jax.set_mesh(mesh):
    split = jax.shard_map(local, in_specs=SPECS, out_specs=P())
    got = jax.jit(jax.value_and_grad(split, (0, 1, 2)))(*spread(mesh, inputs()))
  whole = functools.partial(loss, **options)
  assert_same(got, jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(*inputs()))


def test_gradient_inside_shard_map():
  mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

  def local(*arrays):
    return jax.grad(functools.partial(loss, axis_name="tensor"), (0, 1, 2))(*arrays)

  with jax.set_mesh(mesh):
    got = jax.jit(jax.shard_map(local, in_specs=SPECS, out_specs=SPECS[:3]))(
      *spread(mesh, inputs())
    )
  assert_same(got, jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs()))


def test_only_rows_cross_the_network():
  """What is reduced has one number a token, or is the gradient of E: never N x V."""
  mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Explicit,))
  specs = P(), P("tensor"), P("tensor"), P()
  with jax.set_mesh(mesh):
    arrays = [jax.reshard(a, jax.NamedSharding(mesh, spec)) for a, spec in zip(inputs(), specs)]
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
  N, D = arrays[0].shape
  sent = {(c.kind, c.dtype, c.shape) for c in read_collectives(text, mesh.shape)}
  assert sent == {("all-reduce", "f32", (N,)), ("all-reduce", "f32", (N, D))}


@pytest.mark.parametrize("options", [dict(), dict(reduction="none")], ids=["scalar", "per token"])
def test_gradients_that_are_reduced_later_leave_unsummed(options):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

  def deferred(e_ND, c_VD, bias_V, labels_N):
    e_ND = jax.reshard(e_ND, P("data", None, reduced={"tensor"}))
    c_VD = jax.reshard(c_VD, P("tensor", None, reduced={"data"}))
    gradients = jax.grad(functools.partial(loss, **options), (0, 1))(e_ND, c_VD, bias_V, labels_N)
    assert [jax.typeof(g).sharding.spec.unreduced for g in gradients] == [{"tensor"}, {"data"}]
    return tuple(jax.reshard(g, spec) for g, spec in zip(gradients, SPECS))

  with jax.set_mesh(mesh):
    got = jax.jit(deferred)(*spread(mesh, inputs()))
  assert_same(got, jax.jit(jax.grad(functools.partial(loss, **options), (0, 1)))(*inputs()))


def test_wrong_splits():
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  e_ND, c_VD, _, labels_N = inputs()
  with pytest.raises(ValueError, match="axis_name='tensor': the classifier must be split over it"):
    linear_cross_entropy(e_ND, c_VD, labels_N, axis_name="tensor")
  with jax.set_mesh(mesh):
    with pytest.raises(ValueError, match="gather its D first"):
      linear_cross_entropy(e_ND, jax.reshard(c_VD, P(None, "data")), labels_N)
    with pytest.raises(ValueError, match="both spread over"):
      linear_cross_entropy(jax.reshard(e_ND, P("data")), jax.reshard(c_VD, P("data")), labels_N)
    with pytest.raises(ValueError, match=r"nothing here is summed over \['tensor'\]"):
      jax.jit(
        lambda c_VD: linear_cross_entropy(e_ND, jax.reshard(c_VD, P(reduced={"tensor"})), labels_N)
      )(c_VD)
