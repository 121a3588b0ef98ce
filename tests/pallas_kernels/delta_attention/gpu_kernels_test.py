"""The Hopper kernels in the simulator of a GPU, which raises on races; lowered without a GPU."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values
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
from pallas_kernels.delta_attention import delta_attention

needs_gpu_simulator = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"the GPU simulator came with jax 0.11, this is jax {jax.__version__}",
)
# operands of products are bfloat16
TOLERANCE = dict(o=6e-3, state=6e-3, dq=1e-2, dk=1e-2, dv=1e-2, dstate=1e-2)
TOLERANCE |= dict(ddecay=2e-2, derase=2e-2, dwrite=2e-2)
GATED = dict(T=70, B=1, segments=True)
CASES = {
  "two chunks, two heads of values for one of keys": GATED,
  "three chunks, one at a time, two programs for a head": dict(
    T=130, B=1, N=1, K=136, V=70, decay="heads", erase="channels", write="channels"
  ),
  "no gates": dict(T=20, B=1, N=1, decay=None, erase=None, write=None),
}


def simulated(run, arrays):
  simulator = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")
  return run(arrays, "pallas_gpu", interpret=simulator)


@needs_gpu_simulator
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernels(name, Case, run, recur, assert_close):
  arrays = Case(**CASES[name]).arrays(jnp.bfloat16)
  want = recur(arrays)
  assert_close(simulated(run, arrays), want, {key: TOLERANCE[key] for key in want})


@needs_gpu_simulator
@pytest.mark.slow
def test_gpu_kernels_leak_nothing_from_the_future(Case, run):
  """No gradient reaches a token after the last cotangent; NaN goes to its segment's end."""
  arrays = Case(**GATED).arrays(jnp.bfloat16)
  ids_T, t = arrays["segment_ids"][0], 30
  arrays["do"][:, t + 1 :], arrays["dstate"] = 0, 0 * arrays["dstate"]
  clean = simulated(run, arrays)
  for name in ("dq", "dk", "dv", "ddecay", "derase", "dwrite"):
    assert np.all(clean[name][:, t + 1 :] == 0) and np.any(clean[name][:, : t + 1] != 0), name
  arrays["v"][0, t, 1, 3] = np.nan
  o_TNV = simulated(run, arrays)["o"][0]
  end = t + int(np.argmax(ids_T[t:] != ids_T[t]))
  reached_T = (np.arange(len(ids_T)) >= t) & (np.arange(len(ids_T)) < end)
  assert t + 1 < end < len(ids_T)
  assert np.array_equal(np.isnan(o_TNV[:, 1]).any(axis=-1), reached_T)
  assert np.array_equal(o_TNV[~reached_T], clean["o"][0][~reached_T])
  assert np.array_equal(o_TNV[:, 0], clean["o"][0][:, 0])


def hopper(kind="NVIDIA H200", devices=1):
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  mesh = AbstractMesh((devices,), ("x",), (AxisType.Explicit,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def problem(K, V, dtype=jnp.bfloat16, heads_over=None):
  """Returns the types of q, k, v and gates of 100 positions and 4 heads."""
  heads = (1, 100, 4)
  shapes = ((1, 100, 2, K),) * 2 + ((*heads, V), (*heads, K), heads)
  spread = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, None, heads_over))
  return [jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for shape in shapes]


def loss(q, k, v, decay, beta, **options):
  o_BTNV = delta_attention(q, k, v, decay=decay, erase=beta, write=beta, l2norm=True, **options)
  return jnp.sum(o_BTNV.astype(jnp.float32))


@pytest.mark.parametrize(
  "devices, K, V", [(1, 256, 128), pytest.param(2, 128, 64, marks=pytest.mark.slow)]
)
def test_the_default_lowers_for_hopper(devices, K, V):
  """Forward and backward; one chunk or two in shared memory; on a mesh that splits the heads."""
  with (
    hopper(devices=devices),
    warnings.catch_warnings(action="error", category=DeprecationWarning),
  ):
    spread = "x" if devices > 1 else None
    gradients = jax.jit(jax.grad(loss, range(5)))
    lowered = gradients.trace(*problem(K, V, heads_over=spread)).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
  "kind, dtype, reason",
  [
    ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, "not a Hopper GPU"),
    ("NVIDIA H200", jnp.float32, "q_BTHK.dtype=float32, the kernel multiplies bfloat16"),
  ],
)
def test_a_named_kernel_says_why_it_cannot_run(kind, dtype, reason):
  with hopper(kind):
    arrays = problem(64, 64, dtype)
    with pytest.raises(UnsupportedError, match=reason):
      jax.eval_shape(functools.partial(loss, implementation="pallas_gpu"), *arrays)
    assert "mosaic_gpu" not in str(jax.make_jaxpr(loss)(*arrays))
