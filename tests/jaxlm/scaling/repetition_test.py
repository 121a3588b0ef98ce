"""The law of repeated data against the values that its repository prints."""

import numpy as np
import pytest

from jaxlm.scaling.laws import C4
from jaxlm.scaling.repetition import MUENNIGHOFF


def test_repeated_data_gives_the_published_losses():
  assert MUENNIGHOFF.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
  assert MUENNIGHOFF.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


def test_repeated_data_gives_the_published_allocation():
  """The published one is the best of a grid of token counts; ours is the minimum itself."""
  best = MUENNIGHOFF.allocate(1e22, 25e9)
  assert best.D == pytest.approx(237_336_955_477.55, rel=2e-3)
  assert best.N == pytest.approx(7_022_364_735.88, rel=2e-3)
  assert best.loss <= MUENNIGHOFF.loss(7_022_364_735.88, 237_336_955_477.55, 25e9)


def test_worth_of_epochs():
  epochs = np.array([2.0, 4, 8, 16, 40])
  worth = MUENNIGHOFF.effective_tokens(epochs, 1.0)
  np.testing.assert_allclose(worth, [1.968, 3.726, 6.624, 10.58, 15.17], atol=5e-3)
  assert MUENNIGHOFF.effective_tokens(0.5, 1.0) == 0.5
  assert MUENNIGHOFF.effective_tokens(1e9, 1.0) == pytest.approx(1 + MUENNIGHOFF.R_D)


def test_enough_unique_data_leave_the_base_law():
  N, D = 1e8, 1e10
  assert MUENNIGHOFF.loss(N, D, 1e12) == pytest.approx(C4.loss(N, D), rel=1e-12)
