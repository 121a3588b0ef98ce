"""Writes a table of ticks as numbers: for every rank and tick what to run, read, keep and store."""

# P ranks, S stages, Z ticks
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sharding.pipeline.operations import Kind
from sharding.pipeline.table import Message, Table, assign_slots

IDLE = 0
NOWHERE = -1


class Instruction(NamedTuple):
  """Tells a rank what to do in one tick; each field is an int32 scalar, or [P, Z] of all ticks."""

  branch: Any
  """IDLE, or `branch_of(program of the stage, kind)`"""
  chunk: Any
  """which of the rank's stages it is about"""
  microbatch: Any
  inbox: Any
  """slot of the state or gradient that F or B starts from"""
  stash: Any
  """slot of what is kept from F to B"""
  kept: Any
  """slot of what is kept from F to W"""
  crossing: Any
  """slot of what is kept from B to W"""
  from_left: Any
  """inbox slot for what arrives from the rank before at the end of the tick, or NOWHERE"""
  from_right: Any
  from_self: Any


@dataclasses.dataclass(frozen=True)
class Instructions:
  """Holds all ticks of all ranks and the sizes of what they keep."""

  ticks: Instruction
  inbox_slots: int
  stash_slots: int
  kept_slots: int
  crossing_slots: int


def branch_of(program: int, kind: str) -> int:
  """Returns the number of the branch that runs this kind of operation of a program."""
  return 1 + 3 * program + "FBW".index(kind)


def make_instructions(table: Table, programs: Sequence[int]) -> Instructions:
  """Returns the instructions of a table; `programs` numbers what each of the S stages runs.

  Slots are those of the rank that needs most: every rank runs the same program.
  """
  stages = table.schedule.stages
  P, Z = len(table.ops), table.ticks
  columns = Instruction(*(np.zeros((P, Z), np.int32) for _ in Instruction._fields))
  for arrivals in (columns.from_left, columns.from_right, columns.from_self):
    arrivals[:] = NOWHERE
  inboxes = [_assign_inbox(messages) for messages in _messages_to_ranks(table)]
  sizes = {"inbox": max(1, *(1 + max(slots.values(), default=-1) for slots in inboxes))}
  for rank, inbox in enumerate(inboxes):
    for message, slot in inbox.items():
      arrivals = {
        "right": columns.from_left,
        "left": columns.from_right,
        "stay": columns.from_self,
      }[message.direction]
      arrivals[rank, message.sent] = slot
      columns.inbox[rank, message.read] = slot
  held: dict[str, tuple[Kind, Kind]] = {
    "stash": ("F", "B"),
    "kept": ("F", "W"),
    "crossing": ("B", "W"),
  }
  for name, (first, last) in held.items():
    slots_of_ranks = [assign_slots(row, first, last) for row in table.ops]
    sizes[name] = 1 + max(max(slots.values()) for slots in slots_of_ranks)
    for rank, row in enumerate(table.ops):
      for tick, op in enumerate(row):
        if op is not None:
          getattr(columns, name)[rank, tick] = slots_of_ranks[rank][op.stage, op.microbatch]
  for rank, row in enumerate(table.ops):
    own_stages = [s for s in range(stages) if table.schedule.rank_of(s, 0) == rank]
    for tick, op in enumerate(row):
      if op is not None:
        columns.branch[rank, tick] = branch_of(programs[op.stage], op.kind)
        columns.chunk[rank, tick] = own_stages.index(op.stage)
        columns.microbatch[rank, tick] = op.microbatch
  return Instructions(columns, *(sizes[name] for name in ("inbox", *held)))


def _messages_to_ranks(table: Table) -> list[list[Message]]:
  """Returns what each rank gets, its own last states included, which B of the last stage needs."""
  received: list[list[Message]] = [[] for _ in table.ops]
  for message in table.messages:
    received[message.target].append(message)
  last = table.schedule.stages - 1
  for rank, row in enumerate(table.ops):
    tick_of = {op: tick for tick, op in enumerate(row) if op is not None}
    for op, tick in tick_of.items():
      if op.kind == "F" and op.stage == last:
        read = tick_of[op._replace(kind="B")]
        received[rank].append(Message(op, rank, rank, "stay", tick, read))
  return received


def _assign_inbox(messages: list[Message]) -> dict[Message, int]:
  """Returns a slot for each message; a slot that is read in a tick is free at its end."""
  slots: dict[Message, int] = {}
  for message in sorted(messages, key=lambda m: m.sent):
    held = {slot for other, slot in slots.items() if other.read > message.sent}
    slots[message] = next(i for i in range(len(held) + 1) if i not in held)
  return slots
