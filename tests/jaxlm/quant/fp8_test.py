"""Emulated FP8 is what the kernel computes: the same codes and scales, the same three products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.formats import Fp8Format
from jaxlm.config.quant import BlockwiseProduct, EmulatedProduct
from jaxlm.models.products import blockwise, emulated
from jaxlm.quant import fp8
from pallas_kernels.fp8_matmul import quantize_blocks, quantize_tiles


def draw(*shape):
  """Values that span many powers of two, with a row of zeros and one that float32 hardly holds."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape))
  x[..., 3, :], x[..., 5, :] = 0, 1e-37 * x[..., 5, :]
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("elements", ["e4m3fn", "e5m2"])
def test_codes_and_scales_are_those_of_the_kernel(elements):
  x_MN = draw(128, 256)

  @jax.jit
  def encode(x_MN):
    groups = fp8.encode(x_MN, Fp8Format(elements=elements))
    blocks = fp8.encode(x_MN, Fp8Format(elements=elements, shared="block"))
    tiles = quantize_tiles(x_MN, 1, dtype=elements)
    squares = quantize_blocks(x_MN, dtype=elements)
    bits = [jax.lax.bitcast_convert_type(q.codes, jnp.uint8) for q in (tiles, squares)]
    return (groups, blocks), bits, (tiles.scales, squares.scales)

  ours, bits, scales = encode(x_MN)
  for encoded, their_bits, their_scales in zip(ours, bits, scales):
    np.testing.assert_array_equal(encoded.codes, their_bits)
    np.testing.assert_array_equal(encoded.scale, their_scales)


def test_a_product_of_emulated_operands_is_the_blockwise_one():
  group, block = Fp8Format(), Fp8Format(shared="block")
  ours = EmulatedProduct(weight=block, activation=group, gradient=group)
  kernel = BlockwiseProduct(allow_emulation=True)
  x_BTD, w_DF, dy_BTF = draw(1, 128, 128), draw(128, 256), draw(1, 128, 256)

  def all_three(contract, product, x_BTD, w_DF):
    y_BTF, pull = jax.vjp(lambda x, w: contract(product, None, x, w, None), x_BTD, w_DF)
    return y_BTF, *pull(dy_BTF)

  @jax.jit
  def both(x_BTD, w_DF):
    return all_three(emulated, ours, x_BTD, w_DF), all_three(blockwise, kernel, x_BTD, w_DF)

  emulated_out, kernel_out = both(x_BTD, w_DF)
  scales = [np.abs(value).max() for value in kernel_out]
  chex.assert_trees_all_close(
    [value / scale for value, scale in zip(emulated_out, scales)],
    [value / scale for value, scale in zip(kernel_out, scales)],
    atol=1e-6,
  )
