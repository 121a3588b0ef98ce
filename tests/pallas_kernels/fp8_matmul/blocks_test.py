"""Tiles of the TPU kernels: whole parts, and little padding at sizes that no tile divides."""

import pytest

from pallas_kernels.fp8_matmul import blocks

SIZES = (1, 128, 300, 1000, 4096, 4224, 7168, 16384)


@pytest.mark.parametrize("side", [128, 256])
def test_tiles_are_whole_and_pad_little(side):
  chip = blocks.Core(side, 64 * 2**20)
  for blockwise in (True, False):
    for P in SIZES:
      tile = blocks.product_tile(P, 7168, 4096, 128, blockwise, chip)
      assert tile.P % tile.part_P == 0 and tile.Q % tile.part_Q == 0 and tile.C % 128 == 0
      for size, length in ((P, tile.P), (7168, tile.Q)):
        tiles = -(-size // length)
        assert tiles * length - size < 256 * tiles


@pytest.mark.parametrize("side", [128, 256])
def test_quantisers_read_whole_blocks(side):
  chip = blocks.Core(side, 64 * 2**20)
  for block in (128, 256):
    for M in SIZES:
      rows, columns = blocks.quantizer_tile(M, 7168, block, chip)
      assert rows % block == 0 and 7168 % columns == 0 and columns % block == 0
