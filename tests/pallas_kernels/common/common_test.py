"""What operations share: checks, platform, padding, shards."""

import logging
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import checks, padding, platform, shards
from pallas_kernels.common.errors import UnsupportedError, UserError


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: checks.check(False, "x", 3, "must be 4"), "x=3: must be 4"),
    (lambda: checks.check_choice("x", "c", ("a", "b")), "x='c': must be one of 'a', 'b'"),
    (lambda: checks.check_number("x", 0.0, above=0), "x=0.0: must be above 0"),
    (lambda: checks.check_number("x", -1, at_least=0), "x=-1: must be at least 0"),
    (lambda: checks.check_number("x", float("nan")), "x=nan: must be a finite number"),
    (lambda: checks.check_number("x", True), "x=True: must be a finite number"),
    (lambda: checks.check_shape("x", jnp.ones((2, 3)), (2, 4)), "x.shape=(2, 3): must be (2, 4)"),
    (lambda: checks.check_shape("x", jnp.ones(2), (None, 2)), "x.shape=(2,): must be (any, 2)"),
    (
      lambda: checks.check_dtype("x", jnp.ones(2, jnp.int8), jnp.floating),
      "x.dtype='int8': must be floating",
    ),
    (
      lambda: checks.check_dtype("x", jnp.ones(2, jnp.float16), jnp.dtype("float32")),
      "x.dtype='float16': must be float32",
    ),
  ],
)
def test_a_failed_check_names_argument_value_and_rule(call, message):
  with pytest.raises(UserError, match=re.escape(message)):
    call()


def test_checks_let_good_values_through():
  checks.check_number("x", 0.5, above=0, at_least=0.5)
  checks.check_shape("x", jnp.ones((2, 3)), (None, 3))
  checks.check_dtype("x", jnp.ones(2, jnp.bfloat16), jnp.floating)
  checks.check_dtype("x", jnp.ones(2, jnp.bfloat16), jnp.dtype("bfloat16"))


def test_platform_is_the_meshs_where_there_is_one():
  assert platform.platform() == jax.default_backend() == "cpu"
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  ):
    assert platform.platform() == "gpu"
    assert platform.device_kind() == "NVIDIA H200"


def test_a_choice_is_logged_once(caplog):
  with caplog.at_level(logging.INFO, logger="pallas_kernels.common.platform"):
    for where in ("cpu", "cpu", "tpu"):
      platform.log_once("an_operation", "xla", where)
  assert caplog.messages == ["an_operation runs xla on cpu", "an_operation runs xla on tpu"]


def test_the_kernel_of_the_platform_runs_where_it_can(caplog):
  reasons = {"pallas_tpu": None, "pallas_gpu": "K=3: must be a multiple of 8"}

  def choose(implementation=None, interpret=False):
    kernels = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
    return platform.choose_implementation(
      "an_operation", implementation, kernels, reasons.get, interpret
    )

  def on(name):
    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=1, platform=name)
    return jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    )

  platform.log_once.cache_clear()
  with caplog.at_level(logging.INFO, logger="pallas_kernels.common.platform"):
    with on("tpu"):
      assert [choose(), choose("xla"), choose("reference")] == ["pallas_tpu", "xla", "reference"]
    with on("gpu"):
      assert choose() == "xla"
    assert choose() == "xla"
  assert caplog.messages == [
    "an_operation runs pallas_tpu on tpu",
    "an_operation runs xla (pallas_gpu: K=3: must be a multiple of 8) on gpu",
    "an_operation runs xla on cpu",
  ]
  assert choose("pallas_tpu", interpret=True) == "pallas_tpu"
  for arguments, message in (
    (("cuda",), "implementation='cuda': must be one of None, 'reference', 'xla', 'pallas_tpu'"),
    ((None, True), "interpret=True: needs implementation= one of ['pallas_tpu', 'pallas_gpu']"),
    (("xla", True), "interpret=True: needs implementation= one of ['pallas_tpu', 'pallas_gpu']"),
    (("pallas_gpu",), "implementation='pallas_gpu': K=3: must be a multiple of 8"),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      choose(*arguments)
  with pytest.raises(UnsupportedError):
    choose("pallas_gpu")


def test_padding_goes_at_the_end_of_one_axis():
  assert [padding.round_up(size, 8) for size in (0, 1, 8, 9)] == [0, 8, 8, 16]
  x = jnp.ones((2, 3))
  padded = padding.pad_axis(x, 5, -1, 7)
  chex.assert_trees_all_equal(padded, jnp.concatenate([x, jnp.full((2, 2), 7.0)], axis=1))
  assert padding.pad_axis(x, 2, 0) is x


@pytest.fixture
def mesh():
  devices = jax.devices()
  if len(devices) < 4:
    pytest.skip("needs 4 devices")
  types = (jax.sharding.AxisType.Explicit,) * 2
  return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types, devices=devices[:4])


def test_shards_see_their_part_and_gradients_are_summed_over_the_others(mesh):
  rows_ND, weights_VD = jnp.arange(8.0).reshape(4, 2), jnp.arange(12.0).reshape(6, 2)

  def partial_sum(rows_ND, missing, weights_VD):
    assert missing is None
    chex.assert_shape([rows_ND, weights_VD], [(2, 2), (3, 2)])
    rows_ND, weights_VD = shards.vary_together(rows_ND, weights_VD)
    return jnp.sum(rows_ND @ weights_VD.T, keepdims=True)

  def total(rows_ND, weights_VD):
    layouts = ((("data",), ()), (), (("tensor",), None))
    parts = shards.run_on_shards(
      partial_sum, (rows_ND, None, weights_VD), layouts, P("data", "tensor")
    )
    return jnp.sum(parts)

  with jax.set_mesh(mesh):
    spread = jax.reshard(rows_ND, P("data", None))
    assert shards.sharded_axes(spread, 0) == ("data",) and shards.sharded_axes(spread, 1) == ()
    gradients = jax.jit(jax.grad(total, (0, 1)))(spread, weights_VD)
  expected = jax.grad(lambda r, w: jnp.sum(r @ w.T), (0, 1))(rows_ND, weights_VD)
  chex.assert_trees_all_close(jax.device_get(gradients), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_size_of_the_mesh_is_known_from_types_or_context(kind):
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
  sizes = []

  def record(x):
    sizes.append(shards.mesh_size((x * 2, None), jnp.ones(3)))

  plain = jnp.ones(8)
  jax.eval_shape(record, plain)
  jax.eval_shape(record, jax.device_put(plain, jax.NamedSharding(mesh, P("a"))))
  with jax.set_mesh(mesh):
    jax.eval_shape(record, plain)
    jax.eval_shape(lambda x: jax.shard_map(record, in_specs=P(), out_specs=None)(x), plain)
  assert sizes == [1, 8, 8, 8]
