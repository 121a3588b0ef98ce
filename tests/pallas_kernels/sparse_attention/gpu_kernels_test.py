"""The Hopper kernels in the simulator of a GPU, which raises on races; lowered without a GPU.

The simulator fills what was not written with NaN.
"""

# B batch, T query positions, N query heads, K key heads, H width of queries and keys,
# U width of values, I selected blocks of a query
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.sparse_attention import nsa_selected_attention

needs_gpu_simulator = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"the GPU simulator came with jax 0.11, this is jax {jax.__version__}",
)
# 2 and 12 heads of a group are padded to 8 and 16 rows, a block of 4 or 32 to 64 keys
PACKED = dict(T=11, packed=True, block=4)
TWO_TILES = dict(T=67, N=12, K=1, H=72, U=64, I=2, B=1, block=32)


def simulated(run, case, arrays, lists):
  simulator = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")
  return run(case, "pallas_gpu", arrays, lists, interpret=simulator)


def half(case, call, dtype=jnp.bfloat16):
  *arrays, dlse_BTN = case(**call).arrays(dtype)
  return (*arrays, dlse_BTN)


@needs_gpu_simulator
@pytest.mark.slow
@pytest.mark.parametrize("call, queries", [(PACKED, 11), (TWO_TILES, 9)], ids=["packed", "tiles"])
def test_gpu_kernels(call, queries, case, run, expected, assert_close):
  """The last queries; probabilities and gradients of logits are bfloat16 for the products."""
  q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN = half(case, call)
  last = slice(-queries, None)
  arrays = (q_BTNH[:, last], k_BSKH, v_BSKU, do_BTNU[:, last], dlse_BTN[:, last])
  lists_BTKI = case(**call).lists()[:, last]
  got = simulated(run, call, arrays, lists_BTKI)
  assert_close(got, expected(call, arrays, lists_BTKI), 4e-3, 6e-3)


@needs_gpu_simulator
@pytest.mark.slow
def test_gpu_kernels_confine_what_is_not_finite(case, run, assert_nan_only_where_it_belongs):
  """NaN in keys, values, queries and their cotangents; queries from 9 on give no gradient."""
  q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN = half(case, PACKED)
  lists_BTKI = np.broadcast_to(np.array([1, 0, -1], np.int32), (2, 11, 2, 3))
  k_BSKH[0, 5, 0, 1], v_BSKU[1, 7, 1, 2] = np.nan, np.inf
  q_BTNH[1, 3, 0, 3], do_BTNU[0, 6, 3, 0] = np.nan, np.nan
  do_BTNU[:, 9:], dlse_BTN[:, 9:] = 0, 0
  got = simulated(run, PACKED, (q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN), lists_BTKI)
  arrays = (q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN)
  assert_nan_only_where_it_belongs(got, PACKED, arrays, lists_BTKI)
  for name in ("dk", "dv"):  # no leak from the future
    late = np.asarray(got[name])[:, 9:]
    assert np.all((late == 0) | np.isnan(late).any(axis=-1, keepdims=True)), name
    assert np.any(late == 0), name


@needs_gpu_simulator
@pytest.mark.slow
def test_gpu_kernels_under_vmap_and_without_any_block(case):
  """Queries of the second problem select nothing."""
  q_BTNH, k_BSKH, v_BSKU = half(case, dict(T=5, B=1), jnp.float16)[:3]
  lists_BTKI = np.array([[0], [-1]], np.int32)[:, None, None, None]
  lists_BTKI = np.broadcast_to(lists_BTKI, (2, 1, 5, 2, 1))

  def attend(lists, **options):
    return nsa_selected_attention(q_BTNH, k_BSKH, v_BSKU, lists, block=16, **options)

  got = jax.jit(jax.vmap(functools.partial(attend, implementation="pallas_gpu", interpret=True)))
  o_XBTNU, lse_XBTN = got(lists_BTKI)
  want, _ = attend(lists_BTKI[0], implementation="reference")
  assert np.allclose(o_XBTNU[0], want, atol=2e-3)
  assert np.all(np.asarray(o_XBTNU[1]) == 0) and np.all(np.isneginf(lse_XBTN[1]))


def hopper(devices=1, kind="NVIDIA H200"):
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  mesh = AbstractMesh((devices,), ("x",), (AxisType.Explicit,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def problem(N, K, H, U, dtype=jnp.bfloat16, heads=None):
  """Returns the types of q, k, v and lists of 4 blocks for 100 queries."""
  shapes = ((1, 100, N, H), dtype), ((1, 100, K, H), dtype), ((1, 100, K, U), dtype)
  shapes = (*shapes, ((1, 100, K, 4), jnp.int32))
  spread = heads and NamedSharding(jax.sharding.get_abstract_mesh(), P(None, None, heads))
  return [jax.ShapeDtypeStruct(*shape, sharding=spread) for shape in shapes]


def loss(q, k, v, lists, **options):
  o_BTNU, lse_BTN = nsa_selected_attention(q, k, v, lists, **options)
  return jnp.sum(o_BTNU.astype(jnp.float32)) + jnp.sum(lse_BTN)


@pytest.mark.parametrize(
  "devices, N, K, H, U",
  [(1, 16, 1, 192, 128), pytest.param(2, 2, 2, 64, 64, marks=pytest.mark.slow)],
)
def test_the_default_lowers_for_hopper(devices, N, K, H, U):
  """Forward and both gradients of the paper's widths; and on a mesh that splits the heads."""
  with (
    hopper(devices),
    warnings.catch_warnings(action="error", category=DeprecationWarning),
  ):
    arrays = problem(N, K, H, U, heads="x" if devices > 1 else None)
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(
  "kind, arrays, reason",
  [
    ("NVIDIA A100-SXM4-80GB", problem(4, 1, 64, 64), "not a Hopper GPU"),
    ("NVIDIA H200", problem(4, 1, 64, 64, jnp.float32), "q_BTNH.dtype=float32"),
    ("NVIDIA H200", problem(128, 1, 64, 64), "a group of G=128 heads is more than 64"),
    ("NVIDIA H200", problem(4, 1, 320, 64), "H=320, U=64, block=64 may be at most 256"),
  ],
)
def test_a_named_kernel_says_why_it_cannot_run(kind, arrays, reason):
  with hopper(kind=kind):
    with pytest.raises(UnsupportedError, match=reason):
      jax.eval_shape(functools.partial(loss, implementation="pallas_gpu"), *arrays)
    jaxpr = jax.make_jaxpr(loss)(*arrays)
  assert "mosaic_gpu" not in str(jaxpr)
