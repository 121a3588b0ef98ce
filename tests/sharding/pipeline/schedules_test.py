"""Every generator makes a complete, live schedule, and refuses what it cannot make."""

import pytest

from pallas_kernels.common.errors import UserError
from sharding.pipeline import check_schedule, schedules
from sharding.pipeline.operations import Op

CASES = {
  "gpipe": lambda P, M: schedules.gpipe(P, M),
  "1f1b": lambda P, M: schedules.one_f_one_b(P, M),
  "interleaved": lambda P, M: schedules.interleaved(P, M, 3),
  "circular": lambda P, M: schedules.circular(P, M, 2),
  "zb_h1": lambda P, M: schedules.zb_h1(P, M),
  "zb_h2": lambda P, M: schedules.zb_h2(P, M),
  "zb_v": lambda P, M: schedules.zb_v(P, M),
  "dualpipe": lambda P, M: schedules.dualpipe(P, M),
  "dualpipev": lambda P, M: schedules.dualpipev(P, M),
}


@pytest.mark.parametrize("P,M", [(2, 4), (4, 8), (4, 20), (6, 12), (8, 16)])
@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_done_once_on_its_rank(name, P, M):
  schedule = CASES[name](P, M)
  assert (schedule.name, schedule.ranks, schedule.microbatches) == (name, P, M)
  check_schedule(schedule)


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "circular", "zb_h1", "zb_h2"])
def test_fewer_micro_batches_than_ranks(name, M):
  check_schedule(CASES[name](4, M))


def test_one_rank_is_plain_accumulation():
  assert schedules.one_f_one_b(1, 2).actions == (
    ((Op("F", 0, 0),), (Op("BW", 0, 0),), (Op("F", 0, 1),), (Op("BW", 0, 1),)),
  )


def test_dualpipe_runs_half_of_the_micro_batches_backwards():
  schedule = schedules.dualpipe(4, 8)
  assert [schedule.rank_of(0, m) for m in range(8)] == [0] * 4 + [3] * 4
  pairs = [action for row in schedule.actions for action in row if len(action) == 2]
  assert pairs and all((a.kind, b.kind) == ("F", "BW") for a, b in pairs)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: schedules.gpipe(0, 4), "ranks=0: must be at least 1"),
    (lambda: schedules.zb_h1(4, 0), "microbatches=0: must be at least 1"),
    (lambda: schedules.interleaved(4, 6, 2), "microbatches=6: must be a multiple of the 4 ranks"),
    (lambda: schedules.interleaved(4, 8, 0), "chunks=0: must be at least 1"),
    (lambda: schedules.circular(4, 8, 0), "repeats=0: must be at least 1"),
    (lambda: schedules.zb_v(4, 6), "microbatches=6: zb_v needs at least 2 P - 1 = 7"),
    (lambda: schedules.dualpipe(3, 8), "ranks=3: dualpipe needs an even number"),
    (lambda: schedules.dualpipe(4, 9), "microbatches=9: dualpipe needs an even number"),
    (lambda: schedules.dualpipe(4, 6), "microbatches=6: dualpipe needs at least 2 P = 8"),
    (lambda: schedules.dualpipev(4, 7), "microbatches=7: dualpipev needs at least 2 P = 8"),
  ],
)
def test_what_a_generator_cannot_make_is_refused(make, message):
  with pytest.raises(UserError) as error:
    make()
  assert str(error.value) == message
