"""The heuristic reaches the published bubble rates within the memory that it is given."""

import pytest

from pallas_kernels.common.errors import UserError
from sharding.pipeline import Footprint, Times, auto_schedule, check_schedule, simulate
from tests.sharding.pipeline.published import ROWS


@pytest.mark.parametrize(
  "row",
  [
    pytest.param(row, marks=pytest.mark.slow if row.P > 8 else (), id=f"{row.P}x{row.M}")
    for row in ROWS
  ],
)
def test_published_bubble_rates_of_the_heuristic(row):
  for multiple, published in ((1, row.zb_1p), (2, row.zb_2p)):
    limit = multiple * row.P
    schedule = auto_schedule(row.P, row.M, row.times, row.footprint, limit)
    check_schedule(schedule)
    simulation = simulate(schedule, row.times, row.footprint)
    assert simulation.bubble_rate <= published + 5e-4
    assert max(simulation.peak_bytes) <= limit + 1e-9


def test_unequal_stages_under_a_tight_limit():
  times = Times(hop=0.1, stage_scale=(0.5, 1.0, 1.2, 1.0))
  footprint = Footprint(until_weight_gradient=0.5)
  for limit in (1.0, 2.0, 3.5):
    schedule = auto_schedule(4, 8, times, footprint, limit)
    check_schedule(schedule)
    assert max(simulate(schedule, times, footprint).peak_bytes) <= limit


def test_more_memory_never_costs_time():
  costs = [
    simulate(auto_schedule(4, 16, Times(), Footprint(), limit)).cost for limit in (1, 2, 4, 7)
  ]
  assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


@pytest.mark.parametrize(
  "footprint,limit,message",
  [
    (Footprint(until_input_gradient=3.0), 2.0, "limit=2.0: must hold one micro-batch of 3.0"),
    (
      Footprint(until_input_gradient=1.0, until_weight_gradient=2.0),
      8.0,
      "footprint.until_weight_gradient=2.0: must be at most until_input_gradient=1.0",
    ),
  ],
)
def test_impossible_memory_is_refused(footprint, limit, message):
  with pytest.raises(UserError) as error:
    auto_schedule(4, 8, Times(), footprint, limit)
  assert str(error.value) == message
