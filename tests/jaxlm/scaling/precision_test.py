"""Laws of training in few bits: published shares, order and limits."""

import math

import numpy as np
import pytest

from jaxlm.scaling.precision import KUMAR, PANFEROV, fit_efficiency
from jaxlm.scaling.published import quest


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


def test_published_efficiencies_are_found_again():
  """Squared errors, as the paper fits: every eff within 0.01 of the printed one."""
  fit = fit_efficiency(quest(), delta=1.0)
  for name, value in PANFEROV.efficiency.items():
    assert fit.law.efficiency[name] == pytest.approx(value, abs=0.01), name
  without_hadamard = {"1": 0.0156, "2": 0.0784, "3": 0.3221, "4": 0.6033, "8": 0.9376}
  for name, value in without_hadamard.items():
    assert fit.law.efficiency[f"{name}NOH"] == pytest.approx(value, abs=0.01), name
  assert fit.law.base.alpha == pytest.approx(PANFEROV.base.alpha, abs=2e-3)
  with pytest.raises(ValueError, match="reference='32': must be one of 1, 16"):
    fit_efficiency(quest(), reference="32")
