"""Refuses schedules and tables that are wrong, with one exception class for each kind of fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sharding.pipeline.operations import Op, Schedule
from sharding.pipeline.simulator import DeadlockError, Times, inputs, split, start_times
from sharding.pipeline.table import Table

__all__ = [
  "DeadlockError",
  "DuplicateError",
  "MemoryLimitError",
  "MessageCollisionError",
  "MissingError",
  "OrderError",
  "OwnerError",
  "PrematureReadError",
  "ScheduleError",
  "SlotError",
  "check_schedule",
  "check_table",
]


class ScheduleError(ValueError):
  """Raised for a schedule that does not compute the gradient, or not within its limits."""


class DuplicateError(ScheduleError):
  """Raised where an operation is issued twice, on its own or as part of BW."""


class MissingError(ScheduleError):
  """Raised where an operation is never issued."""


class OwnerError(ScheduleError):
  """Raised where an operation is issued on a rank that does not hold its stage."""


class OrderError(ScheduleError):
  """Raised where a rank issues an operation before one of its own that it needs."""


class MemoryLimitError(ScheduleError):
  """Raised where a rank keeps more activations than allowed."""


class MessageCollisionError(ScheduleError):
  """Raised where two arrays would travel in the same direction out of one rank in one tick."""


class PrematureReadError(ScheduleError):
  """Raised where a tick uses an array before it has arrived."""


class SlotError(ScheduleError):
  """Raised where two activations hold one slot at the same time."""


def check_schedule(schedule: Schedule, limit: int | Sequence[int] | None = None) -> None:
  """Raises the ScheduleError, or DeadlockError, of the first fault; the message says where it is.

  `limit` bounds the activations (stage, micro-batch) that a rank, or each of them, keeps between F
  and the end of W, in the order of its list.
  """
  place_of = _check_ops(schedule)
  for op, (rank, index) in place_of.items():
    for needed in inputs(schedule, op):
      other, position = place_of[needed]
      if other == rank and position > index:
        raise OrderError(
          f"rank {rank}, entry {index}: {op} comes before {needed} (entry {position})"
        )
  start_times(schedule, Times())
  if limit is not None:
    limits = [limit] * schedule.ranks if isinstance(limit, int) else limit
    for rank, most in enumerate(limits):
      _check_limit(schedule, rank, most)


def _check_ops(schedule: Schedule) -> dict[Op, tuple[int, int]]:
  """Returns the (rank, entry) of every F, B and W; each must be there once, on its own rank."""
  place_of: dict[Op, tuple[int, int]] = {}
  for rank, actions in enumerate(schedule.actions):
    for index, action in enumerate(actions):
      for op in split(action):
        known = op.stage in range(schedule.stages) and op.microbatch in range(schedule.microbatches)
        owner = schedule.rank_of(op.stage, op.microbatch) if known else None
        if owner != rank:
          raise OwnerError(f"rank {rank}, entry {index}: {op} belongs to rank {owner}")
        if op in place_of:
          raise DuplicateError(
            f"rank {rank}, entry {index}: {op} is already issued as entry {place_of[op][1]}"
          )
        place_of[op] = rank, index
  for stage in range(schedule.stages):
    for m in range(schedule.microbatches):
      for kind in ("F", "B", "W"):
        if (op := Op(kind, stage, m)) not in place_of:
          raise MissingError(f"rank {schedule.rank_of(stage, m)}: {op} is never issued")
  return place_of


def _check_limit(schedule: Schedule, rank: int, most: int) -> None:
  held = 0
  for index, action in enumerate(schedule.actions[rank]):
    for op in split(action):
      held += {"F": 1, "B": 0, "W": -1}[op.kind]
      if held > most:
        raise MemoryLimitError(
          f"rank {rank}, entry {index}: {op} makes {held} live activations, the limit is {most}"
        )


def check_table(table: Table) -> None:
  """Raises the ScheduleError of the first fault of a table, after `check_schedule` of its lists."""
  check_schedule(table.schedule)
  for rank, (row, actions) in enumerate(zip(table.ops, table.schedule.actions)):
    issued = [op for op in row if op is not None]
    listed = [op for (op,) in actions]
    if issued != listed:
      tick = next((i for i, (a, b) in enumerate(zip(issued, listed)) if a != b), len(issued))
      raise OrderError(f"rank {rank}: the ticks leave its list at operation {tick}")
  for message in table.messages:
    if message.read <= message.sent:
      raise PrematureReadError(
        f"rank {message.target}, tick {message.read}: reads {message.op}, which leaves rank "
        f"{message.source} at the end of tick {message.sent}"
      )
  sent = Counter((m.source, m.sent, m.direction) for m in table.messages if m.direction != "stay")
  for (rank, tick, direction), count in sent.items():
    if count > 1:
      raise MessageCollisionError(f"rank {rank}, tick {tick}: {count} messages to the {direction}")
  for rank, row in enumerate(table.ops):
    _check_slots(rank, row, table.slots[rank])


def _check_slots(rank: int, row: Sequence[Op | None], slots: dict[tuple[int, int], int]) -> None:
  holder: dict[int, Op] = {}
  for tick, op in enumerate(row):
    if op is None:
      continue
    slot = slots[op.stage, op.microbatch]
    if op.kind == "F":
      if slot in holder:
        raise SlotError(f"rank {rank}, tick {tick}: {op} takes slot {slot} of {holder[slot]}")
      holder[slot] = op
    elif op.kind == "W":
      del holder[slot]
