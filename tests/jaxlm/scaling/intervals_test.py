"""Intervals of means."""

import pytest

from jaxlm.scaling.intervals import interval


def test_three_values():
  """Their standard error is 1 / sqrt(3), and the 97.5 % quantile of t with 2 degrees is 4.3027."""
  assert interval([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
