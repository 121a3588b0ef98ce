"""The Hopper kernel in the simulator of a GPU (jax 0.11 and later), and lowered for Hopper."""

# R rows, W width of the rotated axis
import functools
import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.hadamard import hadamard, hadamard_quantize
from tests.pallas_kernels.hadamard.values_test import relative, same_codes

needs_simulator = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"the GPU simulator came with jax 0.11, this is {jax.__version__}",
)
FORMATS = dict(
  int8=dict(dtype="int8"),
  e4m3fn=dict(dtype="e4m3fn"),
  quest=dict(dtype="int4", scale="quest"),
  stochastic=dict(dtype="int4", rounding="stochastic", key=jax.random.key(0)),
)
CASES = {
  "several rotations a chunk": (40, 256, dict(block=32), 128, "float32", ("int8",)),
  "several chunks a rotation": (20, 1024, dict(block=512), 256, "bfloat16", ("e4m3fn", "quest")),
  "another base": (5, 3072, dict(base=12), 128, "float16", ("stochastic",)),
}


def everything(x_RW, dy_RW, signs_W, formats, group, **options):
  """The rotation, its gradient, that of QuEST's rounded values, and codes."""
  options |= dict(signs=signs_W)
  y_RW, pull_back = jax.vjp(functools.partial(hadamard, **options), x_RW)
  arrays = [y_RW, *pull_back(dy_RW)]
  quantize = functools.partial(hadamard_quantize, group=group, **options)
  if "quest" in formats:
    values = functools.partial(quantize, values=True, **FORMATS["quest"])
    arrays += jax.vjp(values, x_RW)[1](dy_RW)
  return arrays, [quantize(x_RW, **FORMATS[name]) for name in formats]


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_codes(case):
  """Ragged tiles; codes are the reference's; a NaN and an infinity spoil their own rotation."""
  R, W, orders, group, dtype, formats = CASES[case]
  rng = np.random.default_rng()
  x_RW, dy_RW = (jnp.asarray(rng.normal(size=(R, W)), dtype) for _ in range(2))
  x_RW = x_RW.at[1, 7].set(jnp.nan).at[2, 200].set(jnp.inf)
  signs_W = jnp.asarray(rng.choice([-1, 1], W), jnp.int8)
  simulator = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")

  def run(**how):
    program = functools.partial(everything, formats=formats, group=group, **orders, **how)
    return jax.jit(program)(x_RW, dy_RW, signs_W)

  got, got_codes = run(implementation="pallas_gpu", interpret=simulator)
  want, want_codes = run(implementation="reference")
  limit = 1e-6 if dtype == "float32" else 1e-4  # a number may round to its neighbour
  for ours, theirs in zip(got, want):
    good = np.isfinite(theirs)
    np.testing.assert_array_equal(np.isfinite(ours), good)
    assert relative(np.where(good, ours, 0), np.where(good, theirs, 0)) < limit
  clean = jnp.delete(jnp.arange(R), jnp.array([1, 2]))
  for ours, theirs in zip(got_codes, want_codes):
    np.testing.assert_array_equal(np.isfinite(ours.scales), np.isfinite(theirs.scales))
    assert not np.isfinite(theirs.scales[1:3]).all(axis=1).any()
    ours, theirs = jax.tree.map(operator.itemgetter(clean), (ours, theirs))
    same_codes(ours, theirs)
    if theirs.trust_mask is not None:
      np.testing.assert_array_equal(ours.trust_mask, theirs.trust_mask)


def on_gpu(kind):
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_lowers_for_hopper_and_is_the_default_there():
  """Rotations within, of and beyond a chunk, without anything that this jax deprecates."""

  def run(x_RW, signs_W):
    y_RW, pull_back = jax.vjp(functools.partial(hadamard, signs=signs_W, block=128), x_RW)
    codes = functools.partial(hadamard_quantize, x_RW, group=256)
    stochastic = codes(block=32, dtype="int8", rounding="stochastic", key=jax.random.key(0))
    return pull_back(y_RW), codes(block=2048, dtype="e4m3fn")[:2], stochastic[:2]

  arrays = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096,), jnp.int8)
  with on_gpu("NVIDIA H200"), warnings.catch_warnings(action="error", category=DeprecationWarning):
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu_v2") == 4


@pytest.mark.parametrize(
  "kind, W, options, message",
  [
    ("H200", 192, dict(block=64), "the last axis of x, 192, must be a multiple of 128"),
    ("H200", 16384, dict(), "the order 16384: a warpgroup multiplies 64 chunks of 128"),
    ("H200", 1536, dict(base=12, group=64), "group=64, the kernel takes multiples of 128"),
    ("H200", 256, dict(dtype="mxfp4", group=128), "dtype='mxfp4', Hopper has no 4-bit floats"),
    ("A100", 128, dict(), "the device is 'NVIDIA A100', not a Hopper GPU"),
  ],
)
def test_what_it_refuses(kind, W, options, message):
  run = hadamard
  if "group" in options:
    run = functools.partial(hadamard_quantize, dtype="int8")
  run = functools.partial(run, implementation="pallas_gpu", **options)
  with on_gpu(f"NVIDIA {kind}"), pytest.raises(UnsupportedError, match=message):
    jax.eval_shape(run, jax.ShapeDtypeStruct((2, W), jnp.float32))
