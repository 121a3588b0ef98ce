"""What the product refuses, what it chooses, and what it says that it does."""

# Y[M, N] = X[M, K] W[K, N]
import jax.numpy as jnp
import pytest

from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.fp8_matmul import (
  Quantized,
  describe,
  fp8_matmul,
  quantize_blocks,
  quantize_tiles,
  scaled_matmul,
)

ONES = jnp.ones((4, 8)), jnp.ones((8, 6))


@pytest.mark.parametrize(
  "arrays, options, message",
  [
    (ONES, dict(scale="e8m0"), "scale='e8m0': must be one of 'f32', 'pow2'"),
    (ONES, dict(dtype="float8"), "dtype='float8': must be one of"),
    (ONES, dict(bwd_dtype="int8"), "bwd_dtype='int8': goes only with itself, dtype='e4m3fn'"),
    (ONES, dict(save="all"), "save='all': must be one of"),
    (ONES, dict(save="fp8"), "save='fp8': needs scale=\"pow2\""),
    (ONES, dict(block=-1), "block=-1: must be a positive integer"),
    (ONES, dict(out_dtype="int8"), "out_dtype='int8': must be floating"),
    (ONES, dict(implementation="cuda"), "implementation='cuda': must be one of"),
    (ONES, dict(interpret=True), "interpret=True: needs implementation="),
    ((ONES[0].astype(int), ONES[1]), dict(), "x_MK.dtype='int32': must be floating"),
    ((ONES[0], ONES[1].T), dict(), r"x_MK.shape=\(4, 8\): must be \(4, 6\)"),
    ((ONES[0][0], ONES[1]), dict(), r"x_MK.shape=\(8,\): must have at least 2 axes"),
  ],
)
def test_what_is_refused(arrays, options, message):
  with pytest.raises(UserError, match=message):
    fp8_matmul(*arrays, allow_emulation=True, **options)


def test_codes_that_the_chip_does_not_multiply():
  for dtype in ("e4m3fn", "e5m2", "int8"):
    with pytest.raises(UnsupportedError, match=f"dtype='{dtype}': 'cpu' does not multiply"):
      fp8_matmul(*ONES, dtype=dtype)
  codes = quantize_tiles(ONES[0], 1), quantize_blocks(ONES[1])
  with pytest.raises(UnsupportedError, match="left.codes='e4m3fn': 'cpu' does not multiply"):
    scaled_matmul(*codes)


def test_scales_that_do_not_fit():
  left, right = quantize_tiles(ONES[0], 1), quantize_blocks(ONES[1])
  wrong = Quantized(left.codes, jnp.ones((4, 2)))
  with pytest.raises(UserError, match=r"left.scales.shape=\(4, 2\): must be \(4, 1\)"):
    scaled_matmul(wrong, right, allow_emulation=True)
  with pytest.raises(UserError, match="left.scales.dtype='bfloat16': must be float32"):
    wrong = Quantized(left.codes, left.scales.astype(jnp.bfloat16))
    scaled_matmul(wrong, right, allow_emulation=True)
  with pytest.raises(UserError, match=r"axes=\(1, 1\): contract sizes 8 and 6"):
    scaled_matmul(left, right, axes=(1, 1), allow_emulation=True)


def test_description():
  assert describe(bwd_dtype="e5m2", scale="pow2", allow_emulation=True) == {
    "forward": "e4m3fn 1x128 x e4m3fn 128x128, pow2 scales, xla on cpu, emulated",
    "input gradient": "e5m2 1x128 x e4m3fn 128x128, pow2 scales, xla on cpu, emulated",
    "weight gradient": "e4m3fn 128x1 x e5m2 128x1, pow2 scales, xla on cpu, emulated",
  }
  with pytest.raises(UnsupportedError, match="allow_emulation=True"):
    describe()
