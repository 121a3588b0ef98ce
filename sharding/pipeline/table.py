"""Lays a schedule out as a table of ticks: one operation per rank and tick, as one program runs it.

All ranks run the same loop. In a tick each of them does one operation (or none), then sends at most
one array to its right and one to its left neighbour on the ring of ranks. BW is done as B and then
W, so that all operations of a tick take about the same time.
"""

# P ranks, S stages, t ticks
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from sharding.pipeline.operations import Kind, Op, Schedule
from sharding.pipeline.simulator import Times, inputs, split, start_times

Direction = Literal["right", "left", "stay"]


class Message(NamedTuple):
  """Describes the output of one operation on its way to the rank that needs it."""

  op: Op
  """What made it: F for the state of the next stage, B for the gradient of the one before."""
  source: int
  target: int
  direction: Direction
  sent: int
  """Tick at whose end it leaves and arrives."""
  read: int
  """Tick in which it is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Holds the ticks of a schedule."""

  schedule: Schedule
  ops: tuple[tuple[Op | None, ...], ...]
  """[P][ticks]; None is an idle tick."""
  messages: tuple[Message, ...]
  slots: tuple[dict[tuple[int, int], int], ...]
  """For each rank (stage, micro-batch) -> the slot of its activations from F to W."""

  @property
  def ticks(self) -> int:
    """Returns the number of ticks."""
    return len(self.ops[0])

  @property
  def slot_counts(self) -> tuple[int, ...]:
    """Returns the number of activation slots that each rank needs."""
    return tuple(1 + max(slots.values()) for slots in self.slots)


def unfuse(schedule: Schedule) -> Schedule:
  """Returns the schedule with every pair issued one after the other and every BW as B, then W."""
  lists = tuple(
    tuple((op,) for action in actions for op in split(action)) for actions in schedule.actions
  )
  return dataclasses.replace(schedule, actions=lists)


def make_table(schedule: Schedule) -> Table:
  """Returns the ticks of `schedule` with all operations of length 1, or raises DeadlockError."""
  schedule = unfuse(schedule)
  starts = start_times(schedule, Times())
  ticks = 1 + round(max(row[-1] for row in starts))
  grid: list[list[Op | None]] = [[None] * ticks for _ in starts]
  tick_of: dict[Op, int] = {}
  for rank, (row, actions) in enumerate(zip(starts, schedule.actions)):
    for start, (op,) in zip(row, actions):
      tick_of[op] = round(start)
      grid[rank][tick_of[op]] = op
  return Table(
    schedule=schedule,
    ops=tuple(map(tuple, grid)),
    messages=tuple(_messages(schedule, tick_of)),
    slots=tuple(assign_slots(row) for row in grid),
  )


def _messages(schedule: Schedule, tick_of: dict[Op, int]) -> list[Message]:
  messages = []
  for reader, read in tick_of.items():
    for op in inputs(schedule, reader):
      if op.stage != reader.stage:
        source = schedule.rank_of(op.stage, op.microbatch)
        target = schedule.rank_of(reader.stage, reader.microbatch)
        direction = _direction(schedule, op)
        messages.append(Message(op, source, target, direction, tick_of[op], read))
  return messages


def _direction(schedule: Schedule, op: Op) -> Direction:
  """Returns the way that the output of `op` takes: a backward pass goes back where F came from."""
  lower = op.stage if op.kind == "F" else op.stage - 1
  P, m = schedule.ranks, op.microbatch
  step = schedule.rank_of(lower + 1, m) - schedule.rank_of(lower, m)
  if step == 0:
    return "stay"
  wraps = lower % P == P - 1 and step == 1 - P  # from the last rank round to the first
  ascends = wraps or step == 1
  return "right" if ascends == (op.kind == "F") else "left"


def assign_slots(
  row: Sequence[Op | None], first: Kind = "F", last: Kind = "W"
) -> dict[tuple[int, int], int]:
  """Returns a slot for each (stage, micro-batch) of a rank, held from `first` to `last`.

  Each takes the lowest slot that is free.
  """
  slots: dict[tuple[int, int], int] = {}
  held: set[int] = set()
  for op in row:
    if op is not None and op.kind == first:
      slots[op.stage, op.microbatch] = next(i for i in range(len(held) + 1) if i not in held)
      held.add(slots[op.stage, op.microbatch])
    elif op is not None and op.kind == last:
      held.remove(slots[op.stage, op.microbatch])
  return slots


def coupled_makespan(table: Table, times: Times) -> float:
  """Returns how long the table takes where each tick waits for the messages of both neighbours.

  A rank starts tick t + 1 when itself, its left and its right neighbour on the ring of ranks have
  ended tick t, whether or not they had anything to send: both permutes run in every tick.
  """
  end_P = np.zeros(len(table.ops))
  for column in zip(*table.ops):
    duration_P = np.array([0.0 if op is None else times.of((op,)) for op in column])
    neighbours_P = np.maximum(np.roll(end_P, 1), np.roll(end_P, -1))
    end_P = np.maximum(end_P, neighbours_P) + duration_P
  return float(end_P.max())
