"""Defines the operations of a pipeline, and the schedule that orders them.

A model is cut into stages 0 .. S-1, each stage lies on one rank, and a batch is cut into
micro-batches. Four kinds of operation act on a stage and a micro-batch: F, the forward pass; B, the
gradient of the stage's input; W, the gradient of its weights; BW, both in one.
"""

# P ranks, S stages, M micro-batches
from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W", "BW"]


class Op(NamedTuple):
  """Names one operation on one stage and micro-batch."""

  kind: Kind
  stage: int
  microbatch: int

  def __str__(self) -> str:
    return f"{self.kind} of stage {self.stage}, micro-batch {self.microbatch}"


Action = tuple[Op, ...]
"""What a rank issues at once: one operation, or a forward and a backward one that overlap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """Holds the ordered actions of every rank, and where every stage lies."""

  name: str
  microbatches: int
  placements: tuple[tuple[int, ...], ...]
  """The rank of every stage; DualPipe has a second row for the second half of the micro-batches."""
  actions: tuple[tuple[Action, ...], ...]
  """For each rank what it issues, in order."""

  @property
  def ranks(self) -> int:
    """Returns the number of pipeline ranks P."""
    return len(self.actions)

  @property
  def stages(self) -> int:
    """Returns the number of stages S."""
    return len(self.placements[0])

  @property
  def chunks(self) -> int:
    """Returns the number of stages that one rank runs for one micro-batch, v = S / P."""
    return self.stages // self.ranks

  def rank_of(self, stage: int, microbatch: int) -> int:
    """Returns the rank that runs this stage for this micro-batch."""
    return self.placements[microbatch * len(self.placements) // self.microbatches][stage]


def make_schedule(name: str, M: int, placements: list[tuple[int, ...]], lists: list) -> Schedule:
  """Returns a schedule of lists in which a bare operation stands for an action of its own."""
  actions = tuple(tuple((x,) if isinstance(x, Op) else x for x in ops) for ops in lists)
  return Schedule(name=name, microbatches=M, placements=tuple(placements), actions=actions)
