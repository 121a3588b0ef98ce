"""Reads and writes schedules as CSV files in the form of PyTorch's pipelining and torchtitan.

One row per rank, one cell per action: `3F5` is the forward pass of micro-batch 5 on stage 3; `I`
stands for the gradient of the input (our B), `W` for that of the weights, `B` for both (our BW);
`(3F5;0B2)OVERLAP_F_B` is a pair, and an empty cell an idle turn.
"""

from __future__ import annotations

import csv
import io
import re

from pallas_kernels.common.errors import UserError
from sharding.pipeline.operations import Action, Op, Schedule

_LETTERS = {"F": "F", "B": "I", "W": "W", "BW": "B"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_OP = re.compile(r"(\d+)([FIWB])(\d+)")
_PAIR = re.compile(r"\((\d+[FIWB]\d+);(\d+[FIWB]\d+)\)OVERLAP_F_B")


def to_csv(schedule: Schedule) -> str:
  """Returns the schedule as CSV text."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerows([_format_action(action) for action in row] for row in schedule.actions)
  return text.getvalue()


def from_csv(text: str, name: str = "csv") -> Schedule:
  """Reads a schedule and infers from its forward passes where each stage lies.

  Raises UserError for a cell that is not in the grammar, a stage of which some micro-batch has no
  forward pass, and a placement other than one or two directions.
  """
  actions = []
  for rank, row in enumerate(csv.reader(io.StringIO(text))):
    cells = [(index, cell.strip()) for index, cell in enumerate(row)]
    actions.append(tuple(_parse_action(cell, rank, index) for index, cell in cells if cell))
  ranks = {
    (op.stage, op.microbatch): rank
    for rank, row in enumerate(actions)
    for action in row
    for op in action
    if op.kind == "F"
  }
  if not ranks:
    raise UserError("csv: holds no forward pass")
  stages = 1 + max(stage for stage, _ in ranks)
  microbatches = 1 + max(m for _, m in ranks)
  for s in range(stages):
    for m in range(microbatches):
      if (s, m) not in ranks:
        raise UserError(f"csv: holds no forward pass of stage {s}, micro-batch {m}")
  paths = [tuple(ranks[s, m] for s in range(stages)) for m in range(microbatches)]
  placements = (paths[0],) if len(set(paths)) == 1 else (paths[0], paths[-1])
  schedule = Schedule(
    name=name, microbatches=microbatches, placements=placements, actions=tuple(actions)
  )
  for (s, m), rank in ranks.items():
    if schedule.rank_of(s, m) != rank:
      raise UserError(f"csv: rank {rank} runs stage {s} of micro-batch {m}, others another one")
  return schedule


def _format_action(action: Action) -> str:
  cells = [f"{op.stage}{_LETTERS[op.kind]}{op.microbatch}" for op in action]
  return cells[0] if len(cells) == 1 else f"({';'.join(cells)})OVERLAP_F_B"


def _parse_action(cell: str, rank: int, index: int) -> Action:
  pair = _PAIR.fullmatch(cell)
  parts = [_OP.fullmatch(part) for part in (pair.groups() if pair else (cell,))]
  ops = [Op(_KINDS[p[2]], int(p[1]), int(p[3])) for p in parts if p]  # type: ignore[arg-type]
  if len(ops) != len(parts):
    rule = "a cell is like 3F5, 0I2, 0W2, 0B2, (3F5;0B2)OVERLAP_F_B, or empty"
    raise UserError(f"csv: row {rank + 1}, cell {index + 1}: {cell!r}: {rule}")
  return tuple(ops)
