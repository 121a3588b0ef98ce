"""Finds schedules for given times under a memory limit.

Follows the heuristic of Qi et al. 2024 (arXiv 2401.10241, section 3.1): warm up with as many
forward passes as fit before the first backward pass arrives, then alternate F and B, and use W to
fill gaps or to free memory. A few lengths of warm-up are tried and the cheapest result is kept.
"""

# P ranks, M micro-batches
from __future__ import annotations

import heapq
import itertools
import math

from pallas_kernels.common.checks import check
from sharding.pipeline.operations import Op, Schedule, make_schedule
from sharding.pipeline.simulator import Footprint, Times, simulate

_ROUNDING = 1e-9


def auto_schedule(
  stages: int, microbatches: int, times: Times, footprint: Footprint, limit: float
) -> Schedule:
  """Returns the schedule of least cost that the heuristic finds; no rank keeps more than `limit`.

  One stage lies on each rank. `limit` is in the unit of `footprint`. Raises UserError where the
  limit does not hold one micro-batch or W needs more than F left.
  """
  check(stages >= 1, "stages", stages, "must be at least 1")
  check(microbatches >= 1, "microbatches", microbatches, "must be at least 1")
  largest = footprint.until_input_gradient
  check(limit >= largest, "limit", limit, f"must hold one micro-batch of {largest}")
  rest = footprint.until_weight_gradient
  rule = f"must be at most until_input_gradient={largest}"
  check(rest <= largest, "footprint.until_weight_gradient", rest, rule)
  schedules = []
  for extra in (-1, 0, 1, 2):
    warmup = _warmup(stages, microbatches, times, int((limit + _ROUNDING) / largest), extra)
    schedules.append(_Planner(microbatches, times, footprint, limit, warmup).run())
  return min(schedules, key=lambda schedule: simulate(schedule, times).cost)


def _warmup(P: int, M: int, times: Times, room: int, extra: int) -> list[int]:
  """Returns how many F each rank does before its first B: what fits before that one, plus `extra`.

  A rank does at least one more than the next rank, so that it never keeps that one waiting.
  """
  forward = [times.of((Op("F", rank, 0),)) for rank in range(P)]
  backward = [times.of((Op("B", rank, 0),)) for rank in range(P)]
  counts: list[int] = []
  for rank in range(P):
    first_forward = sum(forward[:rank]) + rank * times.hop
    first_backward = sum(forward) + sum(backward[rank + 1 :]) + (2 * (P - 1) - rank) * times.hop
    fitting = math.floor((first_backward - first_forward) / forward[rank] + _ROUNDING) + extra
    before = room if rank == 0 else counts[-1] - 1
    counts.append(max(1, min(fitting, M, before)))
  return counts


class _Planner:
  """Plays the pipeline forward in time; a rank that is free decides what it does next."""

  def __init__(self, M: int, times: Times, footprint: Footprint, limit: float, warmup: list[int]):
    self.M, self.times, self.footprint, self.limit, self.warmup = M, times, footprint, limit, warmup
    P = len(warmup)
    self.actions: list[list[Op]] = [[] for _ in range(P)]
    self.done = [{"F": 0, "B": 0, "W": 0} for _ in range(P)]
    self.free_at = [0.0] * P
    self.bubble = [0.0] * P
    self.held = [0.0] * P
    self.turn = ["F"] * P
    self.arrival = {("F", 0, m): 0.0 for m in range(M)}
    """When the input of (kind, rank, micro-batch) is there, as far as it is known."""
    self.order = itertools.count()
    self.wakes = [(0.0, next(self.order), rank) for rank in range(P)]

  def run(self) -> Schedule:
    """Returns the schedule once no rank has anything left to do."""
    while self.wakes:
      now, _, rank = heapq.heappop(self.wakes)
      if now >= self.free_at[rank] - _ROUNDING:
        kind = self.choose(rank, now)
        if kind is not None:
          self.issue(rank, kind, now)
    placement = tuple(range(len(self.actions)))
    return make_schedule("auto", self.M, [placement], self.actions)

  def choose(self, rank: int, now: float) -> str | None:
    """Returns the kind of operation that the free rank does now, or None to wait."""
    done = self.done[rank]
    forward, backward = self.arrival_of(rank, "F"), self.arrival_of(rank, "B")
    fits = self.held[rank] + self.footprint.until_input_gradient <= self.limit + _ROUNDING
    pending = done["W"] < done["B"]
    if done["F"] < self.warmup[rank]:
      return "F" if forward <= now and fits else None
    if done["B"] == self.M:
      return "W" if pending else None
    wanted = "B" if done["F"] == self.M else self.turn[rank]
    if wanted == "F" and fits and forward <= now:
      return "F"
    if wanted == "F" and not fits and pending:
      return "W"  # frees memory for the next F
    if backward <= now:
      return "B"
    if wanted == "F" and not fits:
      return None
    gap = (forward if wanted == "F" else backward) - now  # infinite where its sender has not begun
    fills = gap >= self.times.of((Op("W", rank, 0),)) - _ROUNDING
    longest = self.bubble[rank] + gap > max(self.bubble) + _ROUNDING
    return "W" if pending and (fills or longest) else None

  def arrival_of(self, rank: int, kind: str) -> float:
    """Returns when the input of the rank's next operation of this kind arrives, less rounding."""
    return self.arrival.get((kind, rank, self.done[rank][kind]), math.inf) - _ROUNDING

  def issue(self, rank: int, kind: str, now: float) -> None:
    """Starts an operation: books its time and memory, and tells whoever waits for its output."""
    m = self.done[rank][kind]
    op = Op(kind, rank, m)  # type: ignore[arg-type]
    if self.actions[rank]:
      self.bubble[rank] += now - self.free_at[rank]
    end = self.free_at[rank] = now + self.times.of((op,))
    self.actions[rank].append(op)
    self.done[rank][kind] += 1
    large, small = self.footprint.until_input_gradient, self.footprint.until_weight_gradient
    self.held[rank] += {"F": large, "B": small - large, "W": -small}[kind]
    target = rank + {"F": 1, "B": -1, "W": 0}[kind]
    if kind == "F" and target == len(self.actions):  # the last stage's loss is its own gradient
      self.arrival["B", rank, m] = end
    elif kind != "W" and target >= 0:
      self.arrival[kind, target, m] = end + self.times.hop
      heapq.heappush(self.wakes, (end + self.times.hop, next(self.order), target))
    if kind == "B" or self.done[rank]["F"] >= self.warmup[rank]:
      self.turn[rank] = {"F": "B", "B": "F"}.get(kind, self.turn[rank])
    heapq.heappush(self.wakes, (end, next(self.order), rank))
