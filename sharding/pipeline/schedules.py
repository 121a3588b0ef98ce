"""Makes pipeline schedules as lists of operations, one list per rank, in the order of their issue.

No times are given here; `sharding.pipeline.simulator` adds them.
"""

# P ranks, S stages, M micro-batches, v stages per rank
from __future__ import annotations

from collections import defaultdict, deque

from pallas_kernels.common.checks import check
from sharding.pipeline.operations import Action, Kind, Op, Schedule, make_schedule


def gpipe(stages: int, microbatches: int) -> Schedule:
  """Does all forward passes, then all backward passes (Huang et al. 2019, arXiv 1811.06965)."""
  _check(stages, microbatches)
  lists = [
    [Op("F", r, m) for m in range(microbatches)] + [Op("BW", r, m) for m in range(microbatches)]
    for r in range(stages)
  ]
  return make_schedule("gpipe", microbatches, [tuple(range(stages))], lists)


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
  """Alternates one forward and one backward pass after a warm-up (arXiv 1806.03377)."""
  _check(stages, microbatches)
  lists = []
  for r in range(stages):
    warmup = min(microbatches, stages - r - 1)
    forwards = [Op("F", r, m) for m in range(microbatches)]
    backwards = [Op("BW", r, m) for m in range(microbatches)]
    lists.append(_alternate(forwards, backwards, warmup))
  return make_schedule("1f1b", microbatches, [tuple(range(stages))], lists)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
  """Runs 1F1B over `chunks` stages per rank, stage j P + r on rank r.

  Source: arXiv 2104.04473, section 2.2.

  Raises UserError unless the ranks divide the micro-batches.
  """
  P, M, v = ranks, microbatches, chunks
  _check(P, M)
  check(v >= 1, "chunks", v, "must be at least 1")
  check(M % P == 0, "microbatches", M, f"must be a multiple of the {P} ranks")
  lists = []
  for r in range(P):
    turns = [(k % (P * v) // P, k // (P * v) * P + k % P) for k in range(M * v)]
    forwards = [Op("F", chunk * P + r, m) for chunk, m in turns]
    backwards = [Op("BW", (v - 1 - chunk) * P + r, m) for chunk, m in turns]
    warmup = min(M * v, 2 * (P - r - 1) + (v - 1) * P)
    lists.append(_alternate(forwards, backwards, warmup))
  return make_schedule("interleaved", M, [tuple(s % P for s in range(P * v))], lists)


def circular(ranks: int, microbatches: int, repeats: int) -> Schedule:
  """Does all forward passes, then their reverse, as differentiating a scan over stages does."""
  _check(ranks, microbatches)
  check(repeats >= 1, "repeats", repeats, "must be at least 1")
  lists = []
  for r in range(ranks):
    stages = [j * ranks + r for j in range(repeats)]
    forwards = [Op("F", s, m) for s in stages for m in range(microbatches)]
    lists.append(forwards + [Op("BW", op.stage, op.microbatch) for op in reversed(forwards)])
  placement = tuple(s % ranks for s in range(ranks * repeats))
  return make_schedule("circular", microbatches, [placement], lists)


def zb_h1(stages: int, microbatches: int) -> Schedule:
  """Leaves no bubble with the memory of 1F1B (Qi et al. 2024, arXiv 2401.10241, section 2.1)."""
  return _handcrafted("zb_h1", stages, microbatches, lag=1)


def zb_h2(stages: int, microbatches: int) -> Schedule:
  """Leaves no bubble with twice the memory of 1F1B (arXiv 2401.10241, section 2.2)."""
  return _handcrafted("zb_h2", stages, microbatches, lag=2)


def _handcrafted(name: str, P: int, M: int, lag: int) -> Schedule:
  """Does B `lag` (P - 1 - r) turns after its forward pass, and W `lag` (P - 1) turns after it."""
  _check(P, M)
  lists = []
  for r in range(P):
    ops = []
    for turn in range(M + lag * (P - 1)):
      steps: tuple[tuple[Kind, int], ...] = (
        ("F", turn),
        ("B", turn - lag * (P - 1 - r)),
        ("W", turn - lag * (P - 1)),
      )
      ops += [Op(kind, r, m) for kind, m in steps if 0 <= m < M]
    lists.append(ops)
  return make_schedule(name, M, [tuple(range(P))], lists)


def zb_v(ranks: int, microbatches: int) -> Schedule:
  """Lays two stages on a rank in a V, r and 2P - 1 - r; no bubble at equal times.

  Source: arXiv 2405.15362.

  Raises UserError for fewer than 2P - 1 micro-batches.
  """
  P, M = ranks, microbatches
  _check(P, M)
  check(M >= 2 * P - 1, "microbatches", M, f"zb_v needs at least 2 P - 1 = {2 * P - 1}")
  lists = []
  for r in range(P):
    q = _Queue((r, 2 * P - 1 - r), (range(M), range(M)))
    for _ in range(2 * (P - r) - 1):
      q.issue("F0")
    for _ in range(r):
      q.issue("F1", "F0")
    for _ in range(P - r):
      q.issue("F1", "B1", "W1")
    while q.waiting["F", 0] or q.waiting["F", 1]:
      if q.waiting["F", 0]:
        q.issue("F0")
      q.issue("B0", "W0", "F1", "B1", "W1")
    for _ in range(r):
      q.issue("B0", "B1")
    for _ in range(P - r):
      q.issue("B0", "W0")
    for phase in (1, 0):
      while q.waiting["W", phase]:
        q.issue(f"W{phase}")
    lists.append(q.actions)
  return make_schedule("zb_v", M, [_v_shape(P)], lists)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
  """Feeds micro-batches in at both ends, so that forward passes overlap backward ones.

  Source: arXiv 2412.19437, section 3.2.1.

  Every rank holds two stages' weights. Raises UserError unless the numbers of ranks P and of
  micro-batches are even and there are at least 2P micro-batches.
  """
  P, M = ranks, microbatches
  _check(P, M)
  check(P % 2 == 0, "ranks", P, "dualpipe needs an even number")
  check(M % 2 == 0, "microbatches", M, "dualpipe needs an even number")
  check(M >= 2 * P, "microbatches", M, f"dualpipe needs at least 2 P = {2 * P}")
  halves = (range(M // 2), range(M // 2, M))
  lists = []
  for r in range(P):
    depth = min(r, P - 1 - r)
    directions = halves if r < P // 2 else halves[::-1]
    lists.append(_dual(P // 2, depth, M // 2, _Queue((depth, P - 1 - depth), directions)))
  placements = [tuple(range(P)), tuple(reversed(range(P)))]
  return make_schedule("dualpipe", M, placements, lists)


def dualpipev(ranks: int, microbatches: int) -> Schedule:
  """Folds half of DualPipe into a V: stages r and 2P - 1 - r on rank r, the weights held once.

  Raises UserError for fewer than 2P micro-batches.
  """
  P, M = ranks, microbatches
  _check(P, M)
  check(M >= 2 * P, "microbatches", M, f"dualpipev needs at least 2 P = {2 * P}")
  lists = [_dual(P, r, M, _Queue((r, 2 * P - 1 - r), (range(M), range(M)))) for r in range(P)]
  return make_schedule("dualpipev", M, [_v_shape(P)], lists)


def _dual(half: int, depth: int, count: int, q: _Queue) -> list[Action]:
  """Returns DualPipe's eight steps for the rank `depth` places from an end.

  `half` is the distance over which the two directions meet, `count` the micro-batches of each.
  """
  inner = half - depth - 1
  for _ in range(2 * inner):
    q.issue("F0")
  for _ in range(depth + 1):
    q.issue("F0", "F1")
  for _ in range(inner):
    q.issue("B1", "W", "F1")
  for i in range(count - 2 * half + depth + 1):
    if i == 0 and inner == 0:
      q.issue("F0", "BW1")
    else:
      q.pair("F0", "BW1")
    q.pair("F1", "BW0")
  for _ in range(inner):
    q.issue("BW1")
    q.pair("F1", "BW0")
  split = False
  for i in range(depth + 1):
    is_middle = i == (depth + 1) // 2
    split = split or (is_middle and depth % 2 == 1)
    q.issue("B1" if split else "BW1")
    split = split or (is_middle and depth % 2 == 0)
    q.issue("B0" if split else "BW0")
  for _ in range(inner):
    q.issue("W", "B0")
  for _ in range(depth + 1):
    q.issue("W")
  return q.actions


class _Queue:
  """Numbers the micro-batches of two phases in order, and remembers whose W is still to be done."""

  def __init__(self, stages: tuple[int, int], microbatches: tuple[range, range]):
    self.stages = stages
    self.actions: list[Action] = []
    self.waiting: dict[tuple[str, int], deque[int]] = defaultdict(deque)
    for phase in (0, 1):
      self.waiting["F", phase] = deque(microbatches[phase])
      self.waiting["B", phase] = deque(microbatches[phase])
    self.weights: deque[Op] = deque()

  def issue(self, *names: str) -> None:
    """Appends one action per name: a kind and a phase ("F0", "BW1"), or "W" for the oldest W."""
    self.actions += [(self._next(name),) for name in names]

  def pair(self, forward: str, backward: str) -> None:
    """Appends one action of two operations that overlap."""
    self.actions.append((self._next(forward), self._next(backward)))

  def _next(self, name: str) -> Op:
    if name == "W":
      op = self.weights.popleft()
      self.waiting["W", self.stages.index(op.stage)].popleft()
      return op
    kind, phase = name[:-1], int(name[-1])
    m = self.waiting["B" if kind == "BW" else kind, phase].popleft()
    if kind == "W":
      self.weights.remove(Op("W", self.stages[phase], m))
    if kind == "B":
      self.waiting["W", phase].append(m)
      self.weights.append(Op("W", self.stages[phase], m))
    return Op(kind, self.stages[phase], m)  # type: ignore[arg-type]


def _alternate(forwards: list[Op], backwards: list[Op], warmup: int) -> list[Op]:
  """Returns `warmup` forwards, then forwards and backwards in turn, then the other backwards."""
  steady = [op for pair in zip(forwards[warmup:], backwards) for op in pair]
  return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


def _v_shape(P: int) -> tuple[int, ...]:
  return (*range(P), *reversed(range(P)))


def _check(ranks: int, microbatches: int) -> None:
  check(ranks >= 1, "ranks", ranks, "must be at least 1")
  check(microbatches >= 1, "microbatches", microbatches, "must be at least 1")
