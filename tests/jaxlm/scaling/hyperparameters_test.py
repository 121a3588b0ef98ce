"""Rules for learning rate, batch and width at the points where their sources can be compared."""

import pytest

from jaxlm.scaling.hyperparameters import (
  critical_batch,
  deepseek,
  deepseek_allocation,
  parametrization,
  porian,
  rescale_to_horizon,
  step_law,
)


def test_three_rules_at_one_model():
  """108e6 parameters and 20 tokens for each: learning rates differ threefold."""
  N, D = 108e6, 2.16e9
  rules = [step_law(N, D), deepseek(6 * N * D), porian(N)]
  assert [rule.learning_rate for rule in rules] == pytest.approx([2.5e-3, 1.7e-3, 4.7e-3], rel=0.02)
  assert [rule.batch_tokens for rule in rules] == pytest.approx([1.2e5, 2.5e5, 3.3e5], rel=0.04)


def test_exponents_of_the_step_law():
  assert step_law(2e9, 1e10).learning_rate / step_law(1e9, 1e10).learning_rate == pytest.approx(
    2**-0.713
  )
  assert step_law(1e9, 2e10).batch_tokens / step_law(1e9, 1e10).batch_tokens == pytest.approx(
    2**0.571
  )


def test_allocation_of_deepseek_spends_the_budget():
  for C in (1e18, 1e24):
    M, D = deepseek_allocation(C)
    assert M * D == pytest.approx(C, rel=5e-4)


def test_longer_horizons_want_less_learning_rate():
  assert rescale_to_horizon(1e-3, 1e9, 1.024e12) == pytest.approx(1e-3 * 1024**-0.32)


def test_critical_batch_grows_as_the_loss_falls():
  assert critical_batch(1.0) == 2e8
  assert critical_batch(2.0) == pytest.approx(2e8 / 2 ** (1 / 0.21))


def test_parametrizations():
  base = parametrization("mup", width=1.0)
  assert base == parametrization("mup", width=1.0, depth=3.0)
  wide = parametrization("mup", width=4.0)
  assert (wide.hidden_learning_rate, wide.logits, wide.hidden_init_variance) == (0.25,) * 3
  assert wide.attention == "1/H" and wide.other_learning_rate == 1.0
  deep = parametrization("completep", width=4.0, depth=2.0)
  assert deep.residual_branch == 0.5 and deep.epsilon == 0.125 and deep.hidden_weight_decay == 4.0
  assert parametrization("sp", width=4.0, depth=2.0).hidden_learning_rate == 1.0
  with pytest.raises(ValueError, match="kind='np': must be sp, mup or completep"):
    parametrization("np", width=2.0)
