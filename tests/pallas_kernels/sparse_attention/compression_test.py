"""Compression of blocks against loops over blocks; blocks of packed rows."""

# B batch, S key positions, K key heads, H width, L tokens of a block, F hidden width
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.sparse_attention import (
  block_starts,
  compress_linear,
  compress_mean,
  compress_mlp,
)

B, S, K, H, L, F = 2, 37, 2, 4, 8, 6


jitted_mean = jax.jit(compress_mean, static_argnames="length")
starts = jax.jit(functools.partial(block_starts, length=L, stride=4), static_argnums=0)


def draw(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_forms_are_loops_over_blocks():
  x_BSKH, position_KLH = draw(B, S, K, H), draw(K, L, H)
  linear_KLHZ, up_KLHF, down_KFZ = draw(K, L, H, 3), draw(K, L, H, F), draw(K, F, 5)
  starts_BC = block_starts(S, length=L, stride=4)
  assert starts_BC[0].tolist() == [*range(0, 32, 4)]  # (37 - 8) // 4 + 1 blocks

  @jax.jit
  def forms(x_BSKH):
    mean = compress_mean(x_BSKH, starts_BC, length=L)
    linear = compress_linear(x_BSKH, starts_BC, linear_KLHZ, position_KLH)
    mlp = compress_mlp(x_BSKH, starts_BC, up_KLHF, down_KFZ, position_KLH, activation=jnp.tanh)
    return mean, linear, mlp

  mean, linear, mlp = jax.device_get(forms(x_BSKH))
  for c, k in np.ndindex(8, K):
    block_BLH = x_BSKH[:, 4 * c : 4 * c + L, k]
    chex.assert_trees_all_close(mean[:, c, k], block_BLH.mean(axis=1), atol=1e-6)
    marked_BLH = block_BLH + position_KLH[None, k]
    want = np.einsum("blh,lhz->bz", marked_BLH, linear_KLHZ[k])
    chex.assert_trees_all_close(linear[:, c, k], want, atol=1e-5)
    hidden_BF = np.tanh(np.einsum("blh,lhf->bf", marked_BLH, up_KLHF[k]))
    chex.assert_trees_all_close(mlp[:, c, k], hidden_BF @ down_KFZ[k], atol=1e-5)


@pytest.mark.parametrize("lengths", [(37,), (8, 29), (3, 20, 14), (7, 7, 7, 7, 7, 2), (9, 1, 27)])
def test_segments_have_the_blocks_that_they_have_alone(lengths):
  ids_BS = np.repeat(np.arange(len(lengths)), lengths)[None]
  want, first = [], 0
  for length in lengths:
    want += [first + start for start in starts(length)[0].tolist()]
    first += length
  got = starts(S, segment_ids_BS=ids_BS)[0].tolist()
  assert got == want + [S] * (8 - len(want))
  x_BSKH = draw(1, S, K, H)
  x_BSKH[:, -1] = np.nan  # what is past a row's last block is none
  mean = jitted_mean(x_BSKH, np.array([got]), length=L)
  assert np.all(np.asarray(mean)[:, len(want) :] == 0)


def test_short_rows_have_no_block():
  starts_BC = block_starts(7, length=8, stride=4)
  chex.assert_shape(starts_BC, (1, 0))
  chex.assert_shape(compress_mean(draw(B, 7, K, H), starts_BC, length=8), (B, 0, K, H))


def test_bfloat16_sums_in_float32():
  x_BSKH = jnp.ones((1, 512, 1, 1), jnp.bfloat16)
  got = compress_mean(x_BSKH, block_starts(512, length=512, stride=512), length=512)
  chex.assert_type(got, jnp.bfloat16)
  assert float(got[0, 0, 0, 0]) == 1


def test_weights_that_do_not_fit_are_refused():
  starts_BC = block_starts(S, length=L, stride=4)
  with pytest.raises(UserError, match=r"position_KLH.shape=.*must be \(2, 8, 4\)"):
    compress_linear(draw(B, S, K, H), starts_BC, draw(K, L, H, 3), draw(K, L, H + 1))
  with pytest.raises(UserError, match=r"down_KFZ.shape=.*must be \(2, 6, any\)"):
    compress_mlp(draw(B, S, K, H), starts_BC, draw(K, L, H, F), draw(K, F + 1, 3))


def test_gradient_reaches_the_tokens_of_blocks():
  starts_BC = block_starts(S, length=L, stride=4)
  grad = jax.grad(lambda x: jnp.sum(jitted_mean(x, starts_BC, length=L)[:, 2]))(draw(B, S, K, H))
  assert np.flatnonzero(np.any(np.asarray(grad) != 0, axis=(0, 2, 3))).tolist() == [*range(8, 16)]
