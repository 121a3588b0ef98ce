"""Published laws against the numbers that their sources print, and the algebra between them."""

# N parameters, D training tokens, U unique tokens, C training FLOPs

import dataclasses

import numpy as np
import pytest

from jaxlm.scaling.laws import (
  BESIROGLU,
  C4,
  HOFFMANN,
  HOFFMANN_ROUNDED,
  KAPLAN,
  SumLaw,
  compute_multiplier,
)


@pytest.mark.parametrize(
  ("law", "exponent", "tokens_per_parameter"),
  [(HOFFMANN_ROUNDED, 0.4516, 92.6), (HOFFMANN, 0.4565, 58.9), (BESIROGLU, 0.5126, 18.4)],
)
def test_best_tokens_per_parameter_at_the_budget_of_chinchilla(law, exponent, tokens_per_parameter):
  best = law.allocate(5.76e23)
  assert law.exponent == pytest.approx(exponent, abs=5e-5)
  assert best.D / best.N == pytest.approx(tokens_per_parameter, abs=0.05)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU, KAPLAN, dataclasses.replace(C4, k=0.5)])
def test_the_optimum_is_a_minimum_along_its_budget(law):
  best = law.allocate(1e21)
  assert 6 * best.N * best.D == pytest.approx(1e21)
  for factor in (0.9, 1.1):
    assert law.loss(best.N * factor, best.D / factor) > best.loss
  assert law.alpha * law.A / best.N**law.alpha == pytest.approx(law.beta * law.B / best.D**law.beta)


def test_optimal_loss_in_closed_form():
  """Arxiv:2404.10102's algebra: L - E is (alpha + beta) (A / beta)^a (B / alpha)^b (C / 6)^..."""
  law, C = BESIROGLU, 1e22
  a = law.exponent
  rest = (law.alpha + law.beta) * (law.A / law.beta) ** a * (law.B / law.alpha) ** (1 - a)
  rest *= (C / 6) ** (-law.alpha * law.beta / (law.alpha + law.beta))
  assert law.allocate(C).loss - law.E == pytest.approx(rest, rel=1e-12)


def test_kaplan_is_the_same_form():
  N, D = 1e9, 2e10
  by_hand = ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103
  assert KAPLAN.loss(N, D) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("law", [BESIROGLU, KAPLAN])
def test_inverses(law):
  loss = float(law.loss(3e9, 7e10))
  assert law.tokens_for(loss, 3e9) == pytest.approx(7e10, rel=1e-9)
  assert law.parameters_for(loss, 7e10) == pytest.approx(3e9, rel=1e-9)


def test_losses_that_are_never_reached_are_refused():
  with pytest.raises(ValueError, match="loss=1.8: must be above the law's irreducible E=1.8172"):
    BESIROGLU.tokens_for(1.8, 1e9)
  with pytest.raises(ValueError, match=r"loss=1.9: N=1e\+09 parameters stay above"):
    BESIROGLU.tokens_for(1.9, 1e9)
  with pytest.raises(ValueError, match=r"loss=1.9: D=1e\+09 tokens stay above"):
    BESIROGLU.parameters_for(1.9, 1e9)


def test_inference_makes_models_smaller():
  """Without inference the cheapest model of a loss is the optimum of its own budget."""
  free = BESIROGLU.allocate_for_inference(2.0, 0.0)
  best = BESIROGLU.allocate(6 * free.N * free.D)
  assert free.N == pytest.approx(best.N, rel=1e-3) and best.loss == pytest.approx(2.0, abs=1e-9)
  used = BESIROGLU.allocate_for_inference(2.0, 1e13)
  assert used.N < 0.5 * free.N and BESIROGLU.loss(used.N, used.D) == pytest.approx(2.0)
  cost = 6 * used.N * used.D + 2 * used.N * 1e13
  for factor in (0.9, 1.1):
    N = used.N * factor
    assert 6 * N * BESIROGLU.tokens_for(2.0, N) + 2 * N * 1e13 > cost


def test_compute_multiplier():
  assert compute_multiplier(3.1605, 3.1357, floor=1.6, alpha=0.0941) == pytest.approx(
    1.186, abs=5e-4
  )
  with pytest.raises(ValueError, match="new=1.5: must be above floor=1.6"):
    compute_multiplier(3.0, 1.5, floor=1.6, alpha=0.1)


def test_laws_take_arrays():
  N, D = np.array([1e8, 1e9]), np.array([1e10, 1e11])
  assert isinstance(BESIROGLU, SumLaw)
  np.testing.assert_allclose(
    BESIROGLU.loss(N, D), [BESIROGLU.loss(n, d) for n, d in zip(N, D)], rtol=1e-15
  )
