"""The law of repeated data against the values that its repository prints."""

import numpy as np
import pytest

from jaxlm.scaling.laws import C4
from jaxlm.scaling.published import datablations, gadre
from jaxlm.scaling.repetition import MUENNIGHOFF, fit_repetition


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


@pytest.fixture(scope="module")
def both():
  return fit_repetition(datablations())


def test_fit_of_repetition(both):
  """The published constants are one point of a flat valley; the best has a lower objective."""
  assert both.objective <= 0.0158074 < 0.01582594
  at = {R_D: value / both.objective for R_D, value in both.profile.items()}
  assert max(at[R_D] for R_D in (12.0, 25.0, 50.0, 100.0, 1000.0)) < 1.005
  assert at[1.0] > 1.2 and at[3.0] > 1.05


def test_one_kind_of_decay():
  tokens = fit_repetition(datablations(), decay="tokens")
  assert tokens.law.R_D == pytest.approx(2.915, abs=2e-3)
  assert tokens.objective == pytest.approx(0.0169224, rel=1e-5)
  parameters = fit_repetition(datablations(), decay="parameters")
  assert parameters.law.R_N == pytest.approx(0.742, abs=1e-3)
  assert parameters.objective == pytest.approx(0.0159235, rel=1e-5)


def test_runs_without_unique_tokens_are_refused():
  with pytest.raises(ValueError, match="unique_tokens=None: is not known of 34 of 34 runs"):
    fit_repetition(gadre())
