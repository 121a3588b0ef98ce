"""Tables keep no more activations than the simulation says and need two messages a tick at most."""

import pytest

from sharding.pipeline import Times, check_table, schedules, simulate
from sharding.pipeline.table import coupled_makespan, make_table, unfuse
from tests.sharding.pipeline.schedules_test import CASES


@pytest.mark.parametrize("P,M", [(2, 4), (4, 8), (6, 12)])
@pytest.mark.parametrize("name", CASES)
def test_slots_equal_the_simulated_peak(name, P, M):
  table = make_table(CASES[name](P, M))
  check_table(table)
  assert table.slot_counts == simulate(table.schedule).peak_activations
  assert all(op.kind in "FBW" for row in table.ops for op in row if op is not None)


def test_messages_of_a_ring_and_of_a_v():
  ring = make_table(schedules.interleaved(4, 4, 2)).messages
  assert {m.direction for m in ring if m.op.kind == "F"} == {"right"}
  assert {m.direction for m in ring if m.op.kind == "B"} == {"left"}
  v = make_table(schedules.zb_v(4, 7)).messages
  turn = [m for m in v if m.source == m.target]
  assert len(turn) == 2 * 7 and {m.direction for m in turn} == {"stay"}
  second = {m.direction for m in v if m.op.kind == "F" and m.op.stage > 3}
  assert second == {"left"}


@pytest.mark.parametrize("name,price", [("zb_h1", 0.095), ("zb_h2", 0.063), ("zb_v", 0.099)])
def test_price_of_waiting_for_neighbours(name, price):
  schedule = CASES[name](8, 32)
  table = make_table(schedule)
  assert coupled_makespan(table, Times()) == simulate(unfuse(schedule)).makespan
  times = Times(forward=1.0, input_gradient=1.14, weight_gradient=0.86)
  ratio = coupled_makespan(table, times) / simulate(schedule, times).makespan
  assert ratio - 1 == pytest.approx(price, abs=5e-4)
