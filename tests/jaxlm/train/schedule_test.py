"""Schedules at points computed by hand, and what becomes of them when a run gets more steps."""

import dataclasses

import chex
import jax.numpy as jnp
import pytest

from jaxlm.config import OptimizerConfig, TrainConfig
from jaxlm.train.schedule import check_schedule, describe_change, learning_rate, with_new_steps
from pallas_kernels.common.errors import UserError

STEPS = 100
BASE = OptimizerConfig(learning_rate=1.0, warmup=10, final=0.1, decay=0.2)


class Schedules(chex.TestCase):
  """Learning rates at points computed by hand, compiled and not."""

  def rates(self, schedule: str, *steps: int, **changes) -> list[float]:
    config = dataclasses.replace(BASE, schedule=schedule, **changes)
    rate = self.variant(lambda peak, length, step: learning_rate(config, peak, length, step))
    values = [rate(config.learning_rate, STEPS, step) for step in steps]
    chex.assert_shape(values, ())
    chex.assert_type(values, jnp.float32)
    return [float(value) for value in values]

  @chex.variants(with_jit=True, without_jit=True)
  def test_warmup_is_linear_and_its_first_step_moves(self):
    """(step + 1) / 11 up to the peak at step 10."""
    want = pytest.approx([1 / 11, 5 / 11, 10 / 11, 1], abs=1e-6)
    for schedule in ("cosine", "wsd", "linear", "constant"):
      assert self.rates(schedule, 0, 4, 9, 10) == want, schedule

  @chex.variants(with_jit=True, without_jit=True)
  def test_cosine(self):
    """90 steps follow the warm-up: a third is cos(60 degrees) = 1/2, half-way is (1 + 0.1) / 2."""
    want = [0.1 + 0.9 * 0.75, 0.55, 0.1, 0.1]
    assert self.rates("cosine", 40, 55, 100, 150) == pytest.approx(want, abs=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_linear_and_constant(self):
    assert self.rates("linear", 55, 100, 150) == pytest.approx([0.55, 0.1, 0.1], abs=1e-6)
    assert self.rates("constant", 55, 99, 1000) == [1, 1, 1]

  @chex.variants(with_jit=True, without_jit=True)
  def test_warmup_stable_decay(self):
    """Stable until the last 20 steps, then linear from 1 to 0.1."""
    assert self.rates("wsd", 11, 80, 90, 100) == pytest.approx([1, 1, 0.55, 0.1], abs=1e-6)
    shorter = self.rates("wsd", 90, 95, 100, decay=0.1, final=0.0)
    assert shorter == pytest.approx([1, 0.5, 0], abs=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_no_warmup_starts_at_the_peak(self):
    assert self.rates("linear", 0, 50, 100, warmup=0) == pytest.approx([1, 0.55, 0.1], abs=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_a_decay_longer_than_what_follows_the_warmup_begins_right_after_it(self):
    assert self.rates("wsd", 10, 55, 100, decay=1.0) == pytest.approx([1, 0.55, 0.1], abs=1e-6)


def test_a_warmup_that_leaves_no_step_is_refused():
  with pytest.raises(ValueError, match=r"optimizer\.warmup=100: must be below steps=100"):
    check_schedule(dataclasses.replace(BASE, warmup=100), 100)


def rate(config: TrainConfig, step: float) -> float:
  """The learning rate of a step, where the peak is 1."""
  return float(learning_rate(config.optimizer, 1.0, config.steps, step))


def rates(config: TrainConfig, *steps: float):
  return pytest.approx([rate(config, step) for step in steps], abs=1e-6)


def longer(config: TrainConfig, steps: int, step: int, how: str) -> TrainConfig:
  """The configuration after `step` with another number of steps."""
  return with_new_steps(dataclasses.replace(config, steps=steps), config.steps, step, how)


RUN = TrainConfig(steps=STEPS, optimizer=BASE)


def test_a_run_that_has_ended_keeps_its_rate_falls_from_it_or_begins_again():
  kept, extended, decayed = (longer(RUN, 200, 100, how) for how in ("keep", "extend", "decay"))
  assert [rate(RUN, 99), 0.1, 0.1] == rates(kept, 99, 100, 199)
  assert extended.optimizer == BASE and [0.55] == rates(extended, 105)
  assert [rate(RUN, 50), 0.1, 0.055, 0.01] == rates(decayed, 50, 100, 150, 200)


def test_what_has_been_trained_keeps_its_rates_in_the_new_configuration():
  """So that config.json alone repeats the run: its first half too."""
  for how in ("keep", "decay"):
    config = longer(RUN, 300, 55, how)
    assert [rate(RUN, step) for step in (0, 9, 30, 54)] == rates(config, 0, 9, 30, 54)


def test_a_run_that_was_stopped_on_its_way():
  """Half-way down at step 55, where cosine is 0.55."""
  kept, decayed = longer(RUN, 200, 55, "keep"), longer(RUN, 200, 55, "decay")
  assert [0.55, rate(RUN, 90), 0.1, 0.1] == rates(kept, 55, 90, 100, 150)
  assert [0.55, 0.55 * 0.55, 0.055] == rates(decayed, 55, 127.5, 200)


def test_one_choice_after_another():
  first = longer(RUN, 200, 100, "decay")
  assert longer(first, 300, 200, "extend").optimizer == BASE
  assert [0.055, 0.01, 0.01] == rates(longer(first, 300, 200, "keep"), 150, 200, 299)
  again = longer(first, 300, 150, "decay")  # before the first has ended
  assert again.optimizer.cooldowns == (100, 200, 150, 300)
  want = [rate(first, 125), 0.055, 0.055 * 0.55, 0.0055]
  assert want == rates(again, 125, 150, 225, 300)
  instead = longer(first, 400, 100, "decay")  # resumed from where the first began
  assert instead.optimizer.cooldowns == (100, 400)


def test_a_cooldown_from_the_plateau_is_warmup_stable_decay():
  constant = dataclasses.replace(BASE, schedule="constant")
  config = longer(TrainConfig(steps=80, optimizer=constant), 100, 80, "decay")
  wsd = TrainConfig(steps=100, optimizer=dataclasses.replace(BASE, schedule="wsd"))
  steps = range(0, 101, 20)
  assert [rate(config, step) for step in steps] == rates(wsd, *steps)


def test_a_run_in_its_warmup_cannot_decay():
  with pytest.raises(UserError, match="schedule='decay': the run is at step 5, in its warm-up"):
    longer(RUN, 200, 5, "decay")


def test_a_change_is_said_with_its_numbers():
  extended = dataclasses.replace(RUN, steps=200)
  assert describe_change(RUN, RUN, 50) == ""
  assert describe_change(RUN, extended, 100) == (
    f"learning rate: {rate(extended, 100):.2e} at step 101 instead of 1.00e-01, "
    f"{rate(extended, 199):.2e} at step 200: cosine over 200 steps (was: cosine over 100 steps); "
    "--schedule extend, keep or decay chooses"
  )
  decayed = longer(RUN, 200, 100, "decay")
  assert "cosine over 100 steps, falling from step 100 to 200" in describe_change(RUN, decayed, 100)


@pytest.mark.parametrize("cooldowns", [(1,), (5, 5), (9, 3), (5, 9, 4, 12), (-3, 4)])
def test_cooldowns_that_are_none_are_refused(cooldowns):
  with pytest.raises(UserError, match="optimizer.cooldowns"):
    OptimizerConfig(cooldowns=cooldowns)
