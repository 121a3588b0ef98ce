"""The short convolution against its sum, written out."""

import chex
import numpy as np
import pytest
from absl.testing import parameterized

from jaxlm.models.convolution import short_convolution
from pallas_kernels.common.errors import UserError

B, T, C, W = 2, 7, 5, 3
DRAW = np.random.default_rng(0)
X_BTC = DRAW.normal(size=(B, T, C)).astype(np.float32)
TAPS_WC = DRAW.normal(size=(W, C)).astype(np.float32)
BEFORE_BPC = DRAW.normal(size=(B, W - 1, C)).astype(np.float32)
SEGMENTS_BT = np.array([[1, 1, 2, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2]])


def written_out(segments_BT, before_BPC):
  y_BTC = np.zeros((B, T, C))
  padded_BSC = np.concatenate([before_BPC, X_BTC], axis=1)
  for b, t, j in np.ndindex(B, T, W):
    if segments_BT is None or j == 0 or (t >= j and segments_BT[b, t] == segments_BT[b, t - j]):
      y_BTC[b, t] += np.float64(TAPS_WC[W - 1 - j]) * padded_BSC[b, t - j + W - 1]
  return y_BTC


class ShortConvolution(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters((None, None), (None, BEFORE_BPC), (SEGMENTS_BT, None))
  def test_values_are_the_sums(self, segments_BT, before_BPC):
    got = self.variant(short_convolution)(X_BTC, TAPS_WC, segments_BT, before_BPC)
    zeros_BPC = np.zeros((B, W - 1, C))
    want = written_out(segments_BT, zeros_BPC if before_BPC is None else before_BPC)
    chex.assert_shape(got, (B, T, C))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_taps_that_broadcasting_would_take_are_named():
  with pytest.raises(UserError, match=r"w_WC.shape=\(3, 1\): must be \(any, 5\)"):
    short_convolution(X_BTC, TAPS_WC[:, :1])
