"""Laws of training in few bits: published shares, order and limits."""

import math

import numpy as np
import pytest

from jaxlm.scaling.precision import KUMAR, PANFEROV


def test_precision_laws():
  assert KUMAR.effective_parameters(1.0, 1e9, 1e9, 1e9) == 1.0
  four = -math.expm1(-(4 / 2.6745 + 0.3037))
  assert KUMAR.effective_parameters(2.0, 4, 1e9, 1e9) == pytest.approx(2 * four)
  assert KUMAR.loss(1e9, 2e10, 4, 4, 4) > KUMAR.loss(1e9, 2e10, 8, 8, 8) > KUMAR.loss(1e9, 2e10)
  assert KUMAR.degradation(1e9, 4e10, 4) > KUMAR.degradation(1e9, 2e10, 4)
  losses = [PANFEROV.loss(1e9, 2e10, p) for p in ("1", "2", "3", "4", "16")]
  assert losses == sorted(losses, reverse=True)
  per_bit = {p: PANFEROV.efficiency[p] / int(p) for p in ("1", "2", "3", "4", "8")}
  np.testing.assert_allclose(
    list(per_bit.values()), [0.0205, 0.0759, 0.1444, 0.1730, 0.1270], atol=6e-5
  )
  with pytest.raises(ValueError, match="precision='5': must be one of 16, 1, 2"):
    PANFEROV.loss(1e9, 2e10, "5")
