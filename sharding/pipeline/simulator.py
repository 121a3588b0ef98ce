"""Times a pipeline schedule: an event simulation of ranks that run their lists strictly in order.

The model is that of Qi et al. 2024 (arXiv 2401.10241, sections 2 and 4): an operation starts when
its rank is free and its input has arrived; a message between ranks takes `hop` and occupies nobody.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.common.checks import check
from sharding.pipeline.operations import Action, Kind, Op, Schedule


class DeadlockError(ValueError):
  """Raised where all unfinished ranks wait for operations that never come; names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
  """Holds the durations of one stage's operations, in any unit."""

  forward: float = 1.0
  input_gradient: float = 1.0
  weight_gradient: float = 1.0
  hop: float = 0.0
  """Latency of a message between two ranks."""
  pair: float | None = None
  """Of a forward and a full backward pass that overlap; by default their sum."""
  stage_scale: tuple[float, ...] | None = None
  """Factor on every duration of a stage, for stages of unequal size; by default 1."""

  def of(self, action: Action) -> float:
    """Returns the duration of an action."""
    total = sum(self._of_op(op) for op in action)
    if len(action) == 2 and self.pair is not None:
      return self.pair * max(self._scale(op.stage) for op in action)
    return total

  def _of_op(self, op: Op) -> float:
    backward = self.input_gradient + self.weight_gradient
    kinds = {"F": self.forward, "B": self.input_gradient, "W": self.weight_gradient, "BW": backward}
    return kinds[op.kind] * self._scale(op.stage)

  def _scale(self, stage: int) -> float:
    return 1.0 if self.stage_scale is None else self.stage_scale[stage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
  """Holds the bytes that one stage keeps of one micro-batch."""

  until_input_gradient: float = 1.0
  """From the start of F to the end of B or BW (M_B in the paper)."""
  until_weight_gradient: float = 1.0
  """Of these, what W still needs: from the end of B to the end of W (M_W)."""


@dataclasses.dataclass(frozen=True)
class Simulation:
  """Records when everything happens, in the unit of `Times`, and what is kept meanwhile."""

  schedule: Schedule
  times: Times
  starts: tuple[tuple[float, ...], ...]
  """For each rank the start of each of its actions."""
  peak_activations: tuple[int, ...]
  """For each rank the largest number of (stage, micro-batch) between F and the end of W."""
  peak_residuals: tuple[int, ...]
  """Likewise between F and the end of B, when all that only B needs can be freed."""
  peak_bytes: tuple[float, ...]
  """For each rank the largest sum of footprints."""
  messages: int
  """Sent between different ranks."""

  def ends(self, rank: int) -> list[float]:
    """Returns the end of every action of a rank."""
    actions = self.schedule.actions[rank]
    return [start + self.times.of(a) for start, a in zip(self.starts[rank], actions)]

  @property
  def makespan(self) -> float:
    """Returns the time from 0 to the end of the last operation of all ranks."""
    return max(self.ends(rank)[-1] for rank in range(self.schedule.ranks))

  @property
  def cost(self) -> float:
    """Returns the longest time from a rank's first start to its last end (section 2.3 there)."""
    return max(self.ends(r)[-1] - self.starts[r][0] for r in range(self.schedule.ranks))

  @property
  def idle(self) -> tuple[float, ...]:
    """Returns for each rank the time within `cost` in which it does nothing."""
    return tuple(
      self.cost - sum(self.times.of(action) for action in actions)
      for actions in self.schedule.actions
    )

  @property
  def bubble_rate(self) -> float:
    """Returns the share of `cost` in which the busiest rank idles: (cost - work) / cost."""
    return min(self.idle) / self.cost


def simulate(
  schedule: Schedule, times: Times | None = None, footprint: Footprint | None = None
) -> Simulation:
  """Returns when each rank starts each of its actions as early as its list and its inputs allow.

  Raises DeadlockError where a list waits for ever, UserError for a `stage_scale` of another length.
  """
  times, footprint = times or Times(), footprint or Footprint()
  scale = times.stage_scale
  check(
    scale is None or len(scale) == schedule.stages,
    "times.stage_scale",
    scale,
    f"needs one factor for each of the {schedule.stages} stages",
  )
  starts = start_times(schedule, times)
  ends = [
    [start + times.of(action) for start, action in zip(row, actions)]
    for row, actions in zip(starts, schedule.actions)
  ]
  events = [_events(schedule, rank, starts, ends) for rank in range(schedule.ranks)]
  small, large = footprint.until_weight_gradient, footprint.until_input_gradient
  return Simulation(
    schedule,
    times,
    tuple(tuple(row) for row in starts),
    tuple(_peak(rank, allocate=1, after_input=0, after_weight=-1) for rank in events),
    tuple(_peak(rank, allocate=1, after_input=-1, after_weight=0) for rank in events),
    tuple(
      _peak(rank, allocate=large, after_input=small - large, after_weight=-small) for rank in events
    ),
    _count_messages(schedule),
  )


def start_times(schedule: Schedule, times: Times) -> list[list[float]]:
  """Returns for each rank the earliest start of each action, or raises DeadlockError."""
  done: dict[Op, float] = {}
  starts: list[list[float]] = [[] for _ in schedule.actions]
  free_at = [0.0] * schedule.ranks
  progress = True
  while progress:
    progress = False
    for rank, actions in enumerate(schedule.actions):
      while len(starts[rank]) < len(actions):
        action = actions[len(starts[rank])]
        ready = _ready(schedule, action, done, times.hop)
        if ready is None:
          break
        start = max(free_at[rank], ready)
        free_at[rank] = start + times.of(action)
        done |= {op: free_at[rank] for op in split(action)}
        starts[rank].append(start)
        progress = True
  if waiting := [
    f"rank {rank} at entry {len(row)} ({' with '.join(map(str, actions[len(row)]))})"
    for rank, (row, actions) in enumerate(zip(starts, schedule.actions))
    if len(row) < len(actions)
  ]:
    raise DeadlockError(f"{schedule.name}: waits for ever: {'; '.join(waiting)}")
  return starts


def split(action: Action) -> tuple[Op, ...]:
  """Returns the single operations of an action in order, with B and W in place of a BW."""
  parts: list[Op] = []
  for op in action:
    kinds: tuple[Kind, ...] = ("B", "W") if op.kind == "BW" else (op.kind,)
    parts += [Op(kind, op.stage, op.microbatch) for kind in kinds]
  return tuple(parts)


def inputs(schedule: Schedule, op: Op) -> list[Op]:
  """Returns the operations that have to end before this one may start."""
  kind, s, m = op
  if kind == "F":
    return [Op("F", s - 1, m)] if s else []
  if kind == "W":
    return [Op("B", s, m)]
  before = [Op("F", s, m)]
  return before + ([Op("B", s + 1, m)] if s + 1 < schedule.stages else [])


def _ready(schedule: Schedule, action: Action, done: dict[Op, float], hop: float) -> float | None:
  """Returns when the inputs of an action are there; None while one of them is not yet made."""
  ready = 0.0
  for op in action:
    rank = schedule.rank_of(op.stage, op.microbatch)
    for needed in inputs(schedule, op):
      if needed not in done:
        return None
      travels = schedule.rank_of(needed.stage, needed.microbatch) != rank
      ready = max(ready, done[needed] + hop * travels)
  return ready


def _events(
  schedule: Schedule, rank: int, starts: list, ends: list
) -> list[tuple[float, int, str]]:
  """Returns (time, order, kind) of all starts of F and ends of B and W; frees come first."""
  events: list[tuple[float, int, str]] = []
  for action, start, end in zip(schedule.actions[rank], starts[rank], ends[rank]):
    for part in split(action):
      events.append((start, 2, "F") if part.kind == "F" else (end, part.kind == "W", part.kind))
  # the same instant is computed along different paths: rounding must not tell its events apart
  return sorted((round(time, 9), order, kind) for time, order, kind in events)


def _peak(events: list[tuple[float, int, str]], *, allocate, after_input, after_weight):
  """Returns the largest running sum of the changes that the events make."""
  changes = {"F": allocate, "B": after_input, "W": after_weight}
  held = peak = 0
  for _, _, kind in events:
    held += changes[kind]
    peak = max(peak, held)
  return peak


def _count_messages(schedule: Schedule) -> int:
  boundaries = [
    (schedule.rank_of(s, m), schedule.rank_of(s + 1, m))
    for m in range(schedule.microbatches)
    for s in range(schedule.stages - 1)
  ]
  return 2 * sum(a != b for a, b in boundaries)
