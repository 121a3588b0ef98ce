"""Attention on Explicit meshes: rows and heads are split, a spread length is refused."""

# B batch, T query positions, S key positions, N query heads, K key heads
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention
from pallas_kernels.common.errors import UnsupportedError, UserError
from sharding.collectives import read_collectives

AXES = ("data", "context_ring", "tensor")


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  shapes = [(4, 48, 4, 8), (4, 48, 2, 8), (4, 48, 2, 6), (4, 48, 4, 6)]
  segment_ids_BT = np.sort(rng.integers(0, 3, (4, 48)), axis=1).astype(np.int32)
  return *(rng.normal(size=shape).astype(np.float32) for shape in shapes), segment_ids_BT


@jax.jit
def loss_and_gradients(q_BTNH, k_BSKH, v_BSKU, do_BTNU, segment_ids_BT, positions_BT=None):
  def loss(q, k, v):
    o_BTNU, lse_BTN = attention(
      q,
      k,
      v,
      q_segment_ids_BT=segment_ids_BT,
      q_positions_BT=positions_BT,
      window=20,
      return_lse=True,
    )
    return jnp.sum(o_BTNU * do_BTNU) + jnp.sum(jnp.sin(lse_BTN))

  return jax.value_and_grad(loss, (0, 1, 2))(q_BTNH, k_BSKH, v_BSKU)


def make_mesh(data=1, ring=1, tensor=1):
  kinds = (AxisType.Explicit,) * 3
  devices = jax.devices()[: data * ring * tensor]
  return jax.make_mesh((data, ring, tensor), AXES, axis_types=kinds, devices=devices)


def spread(mesh, arrays, *spec):
  specs = [P(*spec[: array.ndim]) for array in arrays]
  return [
    jax.device_put(array, jax.NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs)
  ]


@pytest.mark.parametrize("data, tensor", [(4, 2), (1, 2), (4, 1)])
def test_rows_and_heads_are_split_without_communication(data, tensor):
  want = loss_and_gradients(*inputs())
  mesh = make_mesh(data=data, tensor=tensor)
  with jax.set_mesh(mesh):
    arrays = spread(mesh, inputs(), "data", None, "tensor", None)
    got = loss_and_gradients(*arrays)
    specs = [jax.typeof(gradient).sharding.spec for gradient in got[1]]
    assert specs == [jax.typeof(array).sharding.spec for array in arrays[:3]]
    program = loss_and_gradients.lower(*arrays).compile().as_text()
  chex.assert_trees_all_close(jax.tree.map(np.asarray, got), want, rtol=1e-4, atol=1e-5)
  sent = read_collectives(program, mesh.shape)
  assert {(c.kind, c.shape) for c in sent} == {("all-reduce", ())}  # the loss


def test_positions_that_all_rows_share_are_not_split():
  mesh = make_mesh(data=4, tensor=2)
  positions_1T = np.arange(48, dtype=np.int32)[None]
  with jax.set_mesh(mesh):
    arrays = spread(mesh, inputs(), "data", None, "tensor", None)
    got = loss_and_gradients(*arrays, positions_1T)
  want = loss_and_gradients(*inputs())
  chex.assert_trees_all_close(jax.tree.map(np.asarray, got), want, rtol=1e-4, atol=1e-5)


def test_looped_blocks_agree_on_a_mesh(run, arrays_of, assert_close):
  case = dict(B=4, T=70, S=70, N=4, K=2, shuffled=True)
  want = run(case, "xla", looped=True)
  mesh = make_mesh(data=2, tensor=2)
  with jax.set_mesh(mesh):
    arrays = spread(mesh, arrays_of(case), "data", None, "tensor", None)
    assert_close(run(case, "xla", arrays, looped=True), want, 1e-6)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_a_spread_length_is_refused_when_traced(implementation):
  mesh = make_mesh(data=2, ring=2, tensor=2)
  attend = jax.jit(functools.partial(attention, implementation=implementation))
  with jax.set_mesh(mesh):
    arrays = spread(mesh, inputs()[:3], "data", "context_ring", "tensor", None)
    wanted = "q_BTNH.*its T=48 is spread over mesh axis context_ring=2"
    with pytest.raises(UnsupportedError, match=wanted):
      attend.lower(*arrays)
    whole = spread(mesh, inputs()[:3], "data", None, "tensor", None)
    with pytest.raises(UnsupportedError, match="k_BSKH.*its S=48 is spread over .*context_ring=2"):
      attend.lower(whole[0], *arrays[1:])


def test_splash_is_refused_where_types_say_what_varies():
  """As in a pipeline: its kernels would not trace. The default takes another implementation."""
  mesh = make_mesh(data=4)
  place = jax.NamedSharding(mesh, P("data"))
  x_BTNH = jax.ShapeDtypeStruct((4, 128, 2, 128), np.float32, sharding=place)

  def attend(x_BTNH, **options):
    split = jax.shard_map(
      lambda x: attention(x, x, x, **options), in_specs=P("data"), out_specs=P("data")
    )
    return jax.eval_shape(split, x_BTNH)

  with jax.set_mesh(mesh):
    with pytest.raises(UnsupportedError, match="does not say over which mesh axes it varies"):
      attend(x_BTNH, implementation="splash", interpret=True)
    assert attend(x_BTNH).shape == x_BTNH.shape


def test_heads_that_do_not_divide_are_refused():
  mesh = make_mesh(tensor=4)
  with jax.set_mesh(mesh):
    (q_BTNH,) = spread(mesh, inputs()[:1], None, None, "tensor", None)
    with pytest.raises(UserError, match="its K=2 heads cannot be split over the 4 devices"):
      attention(q_BTNH, *spread(mesh, inputs()[1:3]))


def test_keys_spread_otherwise_than_queries_are_refused():
  mesh = make_mesh(data=2, tensor=2)
  with jax.set_mesh(mesh):
    (q_BTNH,) = spread(mesh, inputs()[:1], "data", None, None, None)
    with pytest.raises(UserError, match="k_BSKH.*must be spread like q_BTNH"):
      attention(q_BTNH, *spread(mesh, inputs()[1:3], "tensor"))
