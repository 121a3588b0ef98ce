"""Codes and scales against numpy, bit for bit, on numbers that break careless quantisers."""

# M rows, K columns
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.fp8_matmul import dequantize, quantize_blocks, quantize_tiles
from tests.pallas_kernels.fp8_matmul.oracle import FORMATS, MODES, SEED, quantize

BLOCKS = ((1, 128), (128, 1), (128, 128))


def hard_numbers():
  """[300, 400]: every 128 x 128 block, ragged at both ends, has numbers of another kind."""
  rng = np.random.default_rng(SEED)
  x = rng.normal(size=(300, 400)).astype(np.float32)
  x[:128, 128:256] = 0
  x[:128, 256:384] = 3.7  # constant: exact
  x[:, 384:] *= 1e30
  x[128:256, :128] *= 1e-20
  x[128:256, 128:256] = rng.choice([448, -448, 447.9, 1, 464], (128, 128)) * 2.0**-9
  x[128:256, 256:384] *= 1e-40  # subnormal
  x[130, 257] = 1e-37  # its block's scale is the smallest normal number
  x[256:, 5] = 1e6
  x[270, 130], x[271, 131], x[290, 300] = np.nan, np.inf, -np.inf
  return x


@functools.cache
def all_codes():
  """Codes and scales of `hard_numbers` for every block, format and scale, in one program."""

  @jax.jit
  def run(x_MK):
    results = {}
    for dtype in FORMATS:
      for scale in MODES:
        for block in BLOCKS:
          options = dict(dtype=dtype, scale=scale)
          if block == (128, 128):
            results[dtype, scale, block] = quantize_blocks(x_MK, **options)
          else:
            results[dtype, scale, block] = quantize_tiles(x_MK, block.index(128), **options)
    return results

  # in bfloat16, too: what a model quantises
  return {dtype: run(jnp.asarray(hard_numbers(), dtype)) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("scale", MODES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_codes_and_scales_bit_for_bit(dtype, scale, block):
  for given, results in all_codes().items():
    got = results[dtype, scale, block]
    codes, scales, _ = quantize(jnp.asarray(hard_numbers(), given), block, dtype, scale)
    assert got.codes.shape == codes.shape and got.scales.shape == scales.shape
    np.testing.assert_array_equal(np.asarray(got.scales).view(np.int32), scales.view(np.int32))
    # where the scale is not finite a code has no meaning
    number = np.isfinite(scales.repeat(block[0], 0).repeat(block[1], 1)[:300, :400])
    ours = np.asarray(got.codes).view(np.int8)[number]
    np.testing.assert_array_equal(ours, codes.view(np.int8)[number])


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_codes_stand_for(dtype):
  """Zeros and constants are exact; NaN and infinity make their own tile NaN and no other."""
  x_MK = hard_numbers()
  got = all_codes()["float32"][dtype, "f32", (1, 128)]
  back = np.asarray(dequantize(*got, (1, 128)))
  assert (np.asarray(got.codes[:128, 128:256]) == 0).all()
  assert (np.asarray(got.scales[:128, 1]) == 1).all()
  np.testing.assert_allclose(back[:128, 256:384], x_MK[:128, 256:384], rtol=2e-7)
  spoiled = np.isnan(back)
  expected = np.zeros_like(spoiled)
  expected[270, 128:256] = expected[271, 128:256] = expected[290, 256:384] = True
  np.testing.assert_array_equal(spoiled, expected)
  tiny = np.linalg.norm(back[128:256, :128] - x_MK[128:256, :128])
  assert tiny < 0.1 * np.linalg.norm(x_MK[128:256, :128])  # no floor under small numbers


def test_scales_divide():
  """68 scales lie between the codes 64 and 72; a product with the reciprocal often rounds up."""
  scales = np.arange(1, 4096, dtype=np.float32) / 256
  x_MK = np.stack([448 * scales, 68 * scales], axis=1)
  assert (x_MK[:, 1] * (1 / scales) > 68).any()
  got = jax.jit(lambda x: quantize_tiles(x, 1))(x_MK)
  np.testing.assert_array_equal(np.asarray(got.scales)[:, 0], scales)
  assert (got.codes[:, 1] == 64).all()


def test_powers_of_two_are_what_they_say():
  scales = np.asarray(all_codes()["float32"]["e4m3fn", "pow2", (1, 128)].scales)
  plain = np.asarray(all_codes()["float32"]["e4m3fn", "f32", (1, 128)].scales)
  number = np.isfinite(plain)
  assert (np.frexp(scales[number])[0] == 0.5).all()
  ratio = scales[number] / plain[number]
  assert (ratio >= 1).all() and (ratio < 2).all()


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: quantize_tiles(x, 2), "axis=2: must be one of 0, 1"),
    (lambda x: quantize_tiles(x, 1, dtype="fp8"), "dtype='fp8': must be one of 'e4m3fn'"),
    (lambda x: quantize_tiles(x, 1, scale="ue8m0"), "scale='ue8m0': must be one of 'f32', 'pow2'"),
    (lambda x: quantize_blocks(x, block=0), "block=0: must be a positive integer"),
    (lambda x: quantize_blocks(x.astype(int)), "w_KN.dtype='int32': must be floating"),
    (lambda x: quantize_tiles(x[0], 1), r"x_MK.shape=\(8,\): must be \(any, any\)"),
    (
      lambda x: dequantize(*quantize_tiles(x, 1), (8, 1)),
      r"dequantize.scales.shape=\(4, 1\): must be \(1, 8\)",
    ),
  ],
)
def test_what_is_refused(call, message):
  with pytest.raises(UserError, match=message):
    call(jnp.ones((4, 8)))
