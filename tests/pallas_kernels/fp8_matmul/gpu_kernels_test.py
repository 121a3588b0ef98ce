"""The Hopper kernels in the simulator of a GPU (jax 0.11 and later), and lowered for Hopper."""

# Y[M, N] = X[M, K] W[K, N]
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.fp8_matmul import describe, fp8_matmul
from pallas_kernels.fp8_matmul.codes import FORMATS
from pallas_kernels.fp8_matmul.quantize_gpu import quantize
from tests.pallas_kernels.fp8_matmul import oracle
from tests.pallas_kernels.fp8_matmul.quantize_test import hard_numbers

needs_simulator = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"the GPU simulator came with jax 0.11, this is {jax.__version__}",
)
RECIPES = (
  (dict(), (130, 257, 100)),
  (dict(bwd_dtype="e5m2", scale="pow2", save="fp8"), (100, 200, 100)),
)


def simulator():
  return plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")


def value_and_gradients(x, w, dy, **options):
  y, pull_back = jax.vjp(lambda x, w: fp8_matmul(x, w, **options), x, w)
  return y, *pull_back(dy.astype(y.dtype))


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("recipe, sizes", RECIPES, ids=str)
def test_products(recipe, sizes):
  """Several tiles and blocks, all ragged; a NaN in X reaches what depends on its tile alone."""
  x, w, dy = oracle.problem(*sizes)
  x[17, 130] = np.nan
  own = dict(implementation="pallas_gpu", interpret=simulator())
  run = jax.jit(lambda *arrays: value_and_gradients(*arrays, **own, **recipe))
  got = run(x, w, dy)
  want = oracle.products(x, w, dy, **recipe)
  assert [np.isnan(array).any() for array in want] == [True, False, True]
  for name, ours, theirs in zip(("Y", "dX", "dW"), got, want):
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), name)
    assert oracle.error(np.nan_to_num(ours), np.nan_to_num(theirs)) < 1e-6, name


@pytest.mark.slow
@needs_simulator
def test_int8_of_bfloat16_under_vmap_and_the_same_bits_twice():
  """Two problems in one launch; Y and dX are rounded to bfloat16, dW is float32 with its weight."""
  recipe = dict(dtype="int8", scale="pow2")
  one = oracle.problem(40, 130, 20)
  one = jnp.bfloat16(one[0]), one[1], jnp.bfloat16(one[2])
  both = [jnp.stack([array, jnp.roll(array, 3, axis=0)]) for array in one]
  own = dict(implementation="pallas_gpu", interpret=simulator())
  run = jax.jit(jax.vmap(lambda *arrays: value_and_gradients(*arrays, **own, **recipe)))
  got, again = run(*both), run(*both)
  assert [array.dtype for array in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  for ours, repeated in zip(got, again):
    np.testing.assert_array_equal(ours, repeated)
  for i in range(2):
    want = oracle.products(*(array[i] for array in both), **recipe)
    for ours, theirs, limit in zip(got, want, (2.5e-3, 2.5e-3, 1e-6)):
      assert oracle.error(ours[i], theirs) < limit


CODES = {
  "rows": ((1, 128), False, "float32", "e4m3fn", "f32"),
  "rows in bfloat16": ((1, 128), False, "bfloat16", "int8", "pow2"),
  "columns": ((128, 1), True, "float32", "e5m2", "pow2"),
  "columns in bfloat16": ((128, 1), True, "bfloat16", "e4m3fn", "f32"),
  "squares": ((128, 128), False, "float32", "e4m3fn", "f32"),
  "squares, transposed": ((128, 128), True, "float32", "e4m3fn", "pow2"),
}


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("case", CODES)
def test_codes_bit_for_bit(case):
  """Codes, the sign of zeros included, and scales are numpy's."""
  block, transposed, given, dtype, mode = CODES[case]
  x = jnp.asarray(hard_numbers(), given)
  form, simulated = FORMATS[dtype], simulator()
  got = jax.jit(lambda x: quantize(x, block, form, mode, simulated, transposed))(x)
  codes, scales, _ = oracle.quantize(x, block, dtype, mode)
  np.testing.assert_array_equal(np.asarray(got.scales).view(np.int32), scales.view(np.int32))
  # where the scale is not finite a code has no meaning
  number = np.isfinite(scales).repeat(block[0], 0).repeat(block[1], 1)[:300, :400]
  ours = np.asarray(got.codes).view(np.int8)[number]
  np.testing.assert_array_equal(ours, codes.view(np.int8)[number])


def on_gpu(kind, devices=1):
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  return jax.sharding.use_abstract_mesh(AbstractMesh((devices,), ("x",), abstract_device=device))


@pytest.mark.parametrize("dtype, scale", [("e4m3fn", "f32"), ("int8", "pow2")])
def test_lowers_for_hopper_and_is_the_default_there(dtype, scale):
  """Six quantisers and three products, without anything that this jax deprecates."""
  shapes = ((384, 256), jnp.bfloat16), ((256, 512), jnp.float32), ((384, 512), jnp.bfloat16)
  arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  run = jax.jit(lambda *arrays: value_and_gradients(*arrays, dtype=dtype, scale=scale))
  with on_gpu("NVIDIA H200"), warnings.catch_warnings(action="error", category=DeprecationWarning):
    lowered = run.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "pallas_gpu on NVIDIA H200" in describe(dtype=dtype, scale=scale)["weight gradient"]
  assert lowered.as_text().count("custom_call @mosaic_gpu_v2") == 9


def test_where_it_cannot_run():
  named = dict(implementation="pallas_gpu", allow_emulation=True)
  with pytest.raises(UnsupportedError, match="the device is 'cpu', not a Hopper GPU"):
    describe(**named)
  with on_gpu("NVIDIA A100-SXM4-80GB"):
    assert "xla on NVIDIA A100" in describe(allow_emulation=True)["forward"]
    with pytest.raises(UnsupportedError, match="A100-SXM4-80GB', not a Hopper GPU"):
      describe(**named)
  with on_gpu("NVIDIA H200"):
    with pytest.raises(UnsupportedError, match="block=256 is not 128"):
      describe(**named, block=256)
    if jax.__version_info__ < (0, 12):
      assert "xla on NVIDIA H200" in describe(bwd_dtype="e5m2")["forward"]
      with pytest.raises(UnsupportedError, match="need the wgmma of jax 0.12"):
        describe(**named, bwd_dtype="e5m2")
