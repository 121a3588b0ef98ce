"""The simulator gives the published bubble rates, the formulas, and what a longest path gives."""

import dataclasses
import functools

import pytest

from pallas_kernels.common.errors import UserError
from sharding.pipeline import Footprint, Times, schedules, simulate
from sharding.pipeline.operations import Op
from sharding.pipeline.simulator import DeadlockError, inputs
from tests.sharding.pipeline.published import ROWS

GRID = [(1, 3), (2, 4), (3, 9), (4, 8), (4, 24), (8, 16)]
PUBLISHED = [
  pytest.param(row, id=f"{row.P}x{row.M}", marks=pytest.mark.slow if row.P == 32 else ())
  for row in ROWS
]
UNEQUAL = Times(forward=1.0, input_gradient=1.25, weight_gradient=0.75)


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("name", ["one_f_one_b", "zb_h1", "zb_h2"])
def test_published_bubble_rates(row, name):
  schedule = getattr(schedules, name)(row.P, row.M)
  assert round(simulate(schedule, row.times).bubble_rate, 4) == getattr(row, name)


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_bubble_rates_of_interleaved(row):
  v, t = row.chunks, row.times
  chunk = dataclasses.replace(
    t,
    forward=t.forward / v,
    input_gradient=t.input_gradient / v,
    weight_gradient=t.weight_gradient / v,
  )
  # the paper does not count the P hops round the ring
  cost = simulate(schedules.interleaved(row.P, row.M, v), chunk).cost - row.P * t.hop
  work = row.M * (t.forward + t.input_gradient + t.weight_gradient)
  assert round((cost - work) / cost, 4) == row.interleaved


@pytest.mark.parametrize("P,M", GRID)
@pytest.mark.parametrize("times", [Times(), UNEQUAL], ids=["equal", "unequal"])
def test_bubbles_follow_their_formulas(P, M, times):
  f, b, w = times.forward, times.input_gradient, times.weight_gradient

  def bubble(schedule):
    return simulate(schedule, times).cost - M * schedule.chunks * (f + b + w)

  assert bubble(schedules.gpipe(P, M)) == pytest.approx((P - 1) * (f + b + w))
  assert bubble(schedules.one_f_one_b(P, M)) == pytest.approx((P - 1) * (f + b + w))
  assert bubble(schedules.circular(P, M, 2)) == pytest.approx((P - 1) * (f + b + w))
  assert bubble(schedules.zb_h1(P, M)) == pytest.approx((P - 1) * (f + b - w))
  assert bubble(schedules.zb_h2(P, M)) == pytest.approx((P - 1) * max(0, f + b - 2 * w))
  if M % P == 0:
    assert bubble(schedules.interleaved(P, M, 3)) == pytest.approx((P - 1) * (f + b + w))
  if M >= 2 * P - 1:
    assert bubble(schedules.zb_v(P, M)) == pytest.approx(2 * (P - 1) * (b - w))


@pytest.mark.parametrize("P,M", [(2, 4), (4, 8), (4, 12), (8, 16), (8, 40)])
def test_bubble_of_dualpipe(P, M):
  exact = simulate(schedules.dualpipe(P, M)).cost - 3 * M
  assert exact == (P // 2 - 1) * (3 + 2 - 3)
  times = dataclasses.replace(UNEQUAL, pair=2.6)
  bound = (P // 2 - 1) * (2.6 + 2 - 3 * times.weight_gradient)
  # pairs save time against F and BW apart: the work that is left is the busiest rank's own
  simulation = simulate(schedules.dualpipe(P, M), times)
  assert min(simulation.idle) <= bound + 1e-9
  half = simulate(schedules.dualpipev(P, M))
  assert half.cost - 6 * M == (P - 1) * 2


@pytest.mark.parametrize("P,M", GRID)
def test_peaks_of_live_activations(P, M):
  def peaks(schedule):
    simulation = simulate(schedule)
    return list(simulation.peak_activations), list(simulation.peak_residuals)

  ranks = range(P)
  plain = [min(M, P - r) for r in ranks]
  assert peaks(schedules.gpipe(P, M)) == ([M] * P, [M] * P)
  assert peaks(schedules.one_f_one_b(P, M)) == (plain, plain)
  assert peaks(schedules.zb_h1(P, M)) == ([min(M, P)] * P, plain)
  h2 = [min(M, 2 * (P - r) - 1) for r in ranks]
  assert peaks(schedules.zb_h2(P, M)) == ([min(M, 2 * P - 1)] * P, h2)
  if M % P == 0:
    v = 3
    expected = [min(M * v, 2 * (P - r - 1) + (v - 1) * P + 1) for r in ranks]
    assert peaks(schedules.interleaved(P, M, v)) == (expected, expected)
  if M >= 2 * P - 1:
    assert max(peaks(schedules.zb_v(P, M))[0]) == 2 * P
  if M >= 2 * P and M % 2 == P % 2 == 0:
    assert max(peaks(schedules.dualpipe(P, M))[0]) == P + 1


def test_bytes_count_what_weights_still_need():
  footprint = Footprint(until_input_gradient=10.0, until_weight_gradient=4.0)
  simulation = simulate(schedules.zb_h1(4, 8), Times(), footprint)
  # arXiv 2401.10241, Table 2: worker i (1-based) keeps (p - i + 1) M_B + (i - 1) M_W
  assert list(simulation.peak_bytes) == [(4 - r) * 10.0 + r * 4.0 for r in range(4)]


def longest_path(schedule, times):
  """The makespan by memoised recursion over dependencies, written without the simulator's loop."""
  flat = {op: (r, i) for r, row in enumerate(schedule.actions) for i, (op,) in enumerate(row)}

  @functools.cache
  def end(op):
    rank, index = flat[op]
    before = [end(schedule.actions[rank][index - 1][0])] if index else [0.0]
    for needed in inputs(schedule, op):
      fused = Op("BW", needed.stage, needed.microbatch)
      needed = fused if needed not in flat else needed
      before.append(end(needed) + times.hop * (flat[needed][0] != rank))
    return max(before) + times.of((op,))

  return max(end(op) for op in flat)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "zb_h1", "zb_h2", "zb_v"])
def test_makespan_is_the_longest_path(name):
  schedule = getattr(schedules, name)(4, 8)
  scale = tuple(1 + 0.1 * s for s in range(schedule.stages))
  times = dataclasses.replace(UNEQUAL, hop=0.3, stage_scale=scale)
  assert simulate(schedule, times).makespan == pytest.approx(longest_path(schedule, times))


def test_messages_cross_every_boundary_twice():
  assert simulate(schedules.one_f_one_b(4, 6)).messages == 2 * 3 * 6
  assert simulate(schedules.interleaved(4, 8, 2)).messages == 2 * 7 * 8
  assert simulate(schedules.zb_v(4, 7)).messages == 2 * 6 * 7  # the turn of the V is no message


def test_a_list_that_waits_for_ever_is_named():
  schedule = schedules.one_f_one_b(2, 2)
  rows = list(map(list, schedule.actions))
  rows[1][0], rows[1][1] = rows[1][1], rows[1][0]
  broken = dataclasses.replace(schedule, actions=tuple(map(tuple, rows)))
  with pytest.raises(DeadlockError, match=r"rank 1 at entry 0 \(BW of stage 1, micro-batch 0\)"):
    simulate(broken)


def test_stage_scale_needs_one_factor_per_stage():
  with pytest.raises(UserError, match=r"times.stage_scale=\(1.0,\): needs one factor for each of"):
    simulate(schedules.gpipe(2, 2), Times(stage_scale=(1.0,)))
