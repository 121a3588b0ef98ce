"""Each kind of fault raises its own error, which says where it is."""

import dataclasses

import pytest

from sharding.pipeline import check_schedule, check_table, checker, schedules
from sharding.pipeline.operations import Op
from sharding.pipeline.table import make_table


def edited(schedule, rank, edit):
  """The schedule with one rank's list changed by `edit(list)`."""
  rows = [list(row) for row in schedule.actions]
  edit(rows[rank])
  return dataclasses.replace(schedule, actions=tuple(map(tuple, rows)))


def swap(i, j):
  def edit(row):
    row[i], row[j] = row[j], row[i]

  return edit


H1 = schedules.zb_h1(2, 3)


@pytest.mark.parametrize(
  "edit,error,message",
  [
    (lambda row: row.append(row[0]), checker.DuplicateError, r"entry 9: F of .* as entry 0"),
    (lambda row: row.pop(), checker.MissingError, "rank 0: W of stage 0, micro-batch 2 is never"),
    (
      lambda row: row.append((Op("F", 1, 0),)),
      checker.OwnerError,
      "rank 0, entry 9: F of stage 1, micro-batch 0 belongs to rank 1",
    ),
    (lambda row: row.append((Op("F", 2, 0),)), checker.OwnerError, "belongs to rank None"),
    (swap(2, 3), checker.OrderError, r"rank 0, entry 2: W of .* comes before B of .* \(entry 3\)"),
  ],
)
def test_a_wrong_list(edit, error, message):
  with pytest.raises(error, match=message):
    check_schedule(edited(H1, 0, edit))


def test_a_fused_backward_counts_as_its_two_halves():
  fused = edited(H1, 0, lambda row: row.append((Op("BW", 0, 0),)))
  with pytest.raises(checker.DuplicateError, match="B of stage 0, micro-batch 0 is already issued"):
    check_schedule(fused)


def test_ranks_that_wait_for_each_other():
  late = [Op("F", 1, 0), Op("F", 1, 1), Op("BW", 1, 1), Op("BW", 1, 0)]
  first = [Op("F", 0, 0), Op("BW", 0, 0), Op("F", 0, 1), Op("BW", 0, 1)]
  rows = tuple(tuple((op,) for op in row) for row in (first, late))
  schedule = dataclasses.replace(schedules.gpipe(2, 2), actions=rows)
  with pytest.raises(checker.DeadlockError, match="rank 0 at entry 1 .* rank 1 at entry 1"):
    check_schedule(schedule)


def test_memory_limits():
  schedule = schedules.zb_h2(4, 8)
  check_schedule(schedule, limit=7)
  with pytest.raises(checker.MemoryLimitError, match="rank 0, entry 6: .* 7 live .* limit is 6"):
    check_schedule(schedule, limit=6)
  with pytest.raises(checker.MemoryLimitError, match="rank 3"):
    check_schedule(schedule, limit=[7, 7, 7, 6])


def test_wrong_tables():
  table = make_table(H1)
  check_table(table)
  messages = table.messages
  early = dataclasses.replace(
    table, messages=(messages[0]._replace(read=messages[0].sent), *messages[1:])
  )
  with pytest.raises(checker.PrematureReadError, match="rank 0, tick 2: reads B of stage 1"):
    check_table(early)
  twice = dataclasses.replace(table, messages=(*messages, messages[0]))
  with pytest.raises(checker.MessageCollisionError, match="rank 1, tick 2: 2 messages to the left"):
    check_table(twice)
  shared = dataclasses.replace(table, slots=(dict.fromkeys(table.slots[0], 0), table.slots[1]))
  with pytest.raises(checker.SlotError, match="rank 0, tick 1: .* takes slot 0 of F of stage 0"):
    check_table(shared)
  moved = dataclasses.replace(table, ops=(table.ops[0][::-1], table.ops[1]))
  with pytest.raises(checker.OrderError, match="rank 0: the ticks leave its list at operation 0"):
    check_table(moved)
