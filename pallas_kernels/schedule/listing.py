"""Reads the TPU compiler's listing of VLIW bundles as a tree of loops and skippable regions.

Two listings of one kernel are used: the bundles after register allocation, and the functional units
that each bundle uses. They are the last in which one bundle is one clock cycle; later ones fold
idle cycles into delay fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.common.chips import TensorCore

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:[\s>]*\{", re.M)
BRANCH = re.compile(r"sbr\.rel\s*(?:\(!?%(\w+)\))?[^;]*?target bundleno = (\d+)")
MATMUL = re.compile(r"= vmatmul((?:\.[a-z]\w*)+)")
REGISTERS = re.compile(r"\.(mxu\d|mr[bf]|gmra|vlgmr|msr[ab]|mubr)\b")
OPPOSITE = ({"eq", "ne"}, {"lt", "ge"}, {"le", "gt"})


class DumpError(ValueError):
  """Raised for a listing that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class Matmul:
  """Describes one kind of MXU instruction."""

  operands: str
  rows: int
  """Rows of the left operand."""
  busy: int
  """MXU time in units of TensorCore.mxu_cycles."""


def matmul_kind(suffixes: str) -> Matmul:
  """Returns the kind of a vmatmul instruction from its dotted suffixes."""
  if ".s4" in suffixes or ".u4" in suffixes:
    return Matmul("s4", 64, 2)
  if ".s8" in suffixes or ".u8" in suffixes:
    return Matmul("s8", 32, 2)
  if (
    "f8e" in suffixes or "bf8" in suffixes
  ):  # a trailing .bf16: widened on the way in, at bfloat16's rate
    return Matmul("f8 as bf16", 32, 4) if suffixes.endswith(".bf16") else Matmul("f8", 32, 2)
  return Matmul("bf16", 16, 2) if ".bf16" in suffixes else Matmul("f32 as bf16", 8, 1)


@dataclasses.dataclass
class Span:
  """Holds bundles [start, end): the body of a loop, or a region that a branch may skip."""

  start: int
  end: int
  loop: bool = False
  trips: int | None = None
  """Of a loop; None where the bound is dynamic."""
  test: tuple[str, str] | None = None
  """Of a region: comparison and operands under which it is skipped."""
  children: list[Span] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Total:
  """Sums what one pass over a span is expected to execute."""

  cycles: float = 0.0
  units: Counter[str] = dataclasses.field(default_factory=Counter)
  matmuls: Counter[Matmul] = dataclasses.field(default_factory=Counter)

  def add(self, other: Total, weight: float) -> None:
    """Adds `weight` times the other total."""
    self.cycles += weight * other.cycles
    for mine, theirs in ((self.units, other.units), (self.matmuls, other.matmuls)):
      for key, count in theirs.items():
        mine[key] += weight * count  # type: ignore[index, assignment]

  def mxu_use(self, core: TensorCore) -> float:
    """Returns the share of the cycles in which the MXUs are busy."""
    busy = sum(count * kind.busy for kind, count in self.matmuls.items())
    return busy * core.mxu_cycles / (core.mxus * max(self.cycles, 1))


class KernelSchedule:
  """Holds one compiled kernel. Raises DumpError where its listings are not as known here.

  `trips` are those of the loops with a dynamic bound, in the order of the listing, outer ones
  first; the grid's own loop is not among them. Without, such a loop counts once.
  """

  def __init__(self, bundles: str, use: str, core: TensorCore, trips: Sequence[float] = ()):
    self.core = core
    text = re.sub(r"/\*.*?\*/", "", bundles, flags=re.S)
    marks = list(BUNDLE.finditer(text))
    if not marks:
      raise DumpError("no bundles in the listing")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    self.bundles = [text[mark.end() : end] for mark, end in zip(marks, ends)]
    self.units, self.slots, self.use = read_use(use)
    if len(self.use) != len(self.bundles):
      raise DumpError(f"{len(self.bundles)} bundles, but the use of {len(self.use)} is listed")
    self.matmuls = [
      [matmul_kind(REGISTERS.sub("", m)) for m in MATMUL.findall(b)] for b in self.bundles
    ]
    self.root = self._tree(text)
    self.dynamic = [loop for loop in self.loops() if loop.trips is None]
    self.assumed = dict(zip(map(id, self.dynamic[len(self.dynamic) - len(trips) :]), trips))

  def _tree(self, text: str) -> Span:
    size, spans = len(self.bundles), []
    for i, bundle in enumerate(self.bundles):
      if "sbr." in bundle and not BRANCH.search(bundle):
        raise DumpError(f"bundle {i}: unknown branch {bundle.strip()[:120]!r}")
      for predicate, target_text in BRANCH.findall(bundle):
        target, after = int(target_text), min(i + 1 + self.core.delay_slots, size)
        if target > size:
          raise DumpError(f"bundle {i} branches to {target}, the listing ends at {size}")
        if target <= i:
          spans.append(Span(target, after, loop=True, trips=trip_count(text, predicate)))
        elif target > after:
          spans.append(Span(after, target, test=skip_test(text, predicate)))
    return nest(Span(0, size), spans)

  def multiplies(self, span: Span) -> bool:
    """Tells whether a span holds matmuls."""
    return any(self.matmuls[span.start : span.end])

  def total(self, span: Span, rare: float) -> Total:
    """Sums one pass over `span`, in which regions without matmuls run with probability `rare`.

    The two sides of an if count half each; a loop with a dynamic bound counts once.
    """
    out, at = Total(), span.start
    for child in span.children:
      out.add(self._straight(at, child.start), 1)
      if child.loop:
        weight = float(child.trips or self.assumed.get(id(child), 1))
      elif not self.multiplies(self.root) or self.multiplies(child):
        weight = 1.0
      else:
        weight = rare
      if any(opposite(child, sibling) for sibling in span.children):
        weight /= 2
      out.add(self.total(child, rare), weight)
      at = child.end
    out.add(self._straight(at, span.end), 1)
    return out

  def _straight(self, start: int, end: int) -> Total:
    units = Counter(dict(zip(self.units, self.use[start:end].sum(axis=0).tolist())))
    return Total(
      end - start, units, Counter(kind for kinds in self.matmuls[start:end] for kind in kinds)
    )

  def loops(self, span: Span | None = None) -> Iterator[Span]:
    """Yields the loops below `span` (None: all), outer ones first."""
    for child in (span or self.root).children:
      if child.loop:
        yield child
      yield from self.loops(child)


def read_use(text: str) -> tuple[list[str], dict[str, int], np.ndarray]:
  """Returns the functional units, how often a bundle may use each, and a row of uses per bundle."""
  try:
    head, body = text.split("== UTILIZATION:")
    units = [unit.strip() for unit in head.split("\n")[1].split(",")]
    slots = dict(zip(units, map(int, head.split("\n")[2].split()), strict=True))
    rows = np.array([line.split() for line in body.split("\n") if line.strip()], int)
  except (ValueError, IndexError) as error:
    raise DumpError(f"the use of functional units cannot be read: {error}") from error
  if rows.ndim != 2 or rows.shape[1] != len(units):
    raise DumpError(f"{len(units)} functional units, but rows of use have shape {rows.shape}")
  return units, slots, rows


def nest(root: Span, spans: list[Span]) -> Span:
  """Nests the spans below `root` by which contains which, and returns it."""
  stack = [root]
  for span in sorted(spans, key=lambda span: (span.start, -span.end)):
    while span.start >= stack[-1].end:
      stack.pop()
    span.end = min(span.end, stack[-1].end)
    stack[-1].children.append(span)
    stack.append(span)
  return root


def trip_count(text: str, predicate: str) -> int | None:
  """Reads `exit = next >= LIMIT; next = i + STEP; i = INIT`; None where LIMIT is no constant."""
  test = re.search(
    rf"%{predicate} = scmp\.\w+\.s32\.totalorder (?:\(!?%\w+\),? )?%(\w+), (\d+)\b", text
  )
  if not predicate or test is None:
    return None
  step = re.search(rf"%{test[1]} = sadd\.s32 (\d+), %(\w+)", text)
  phi = step and re.search(rf"%{step[2]} = sphi %(\w+), %", text)
  first = phi and re.search(rf"%{phi[1]} = smov (\d+)\b", text)
  return math.ceil((int(test[2]) - int(first[1] if first else 0)) / int(step[1] if step else 1))


def skip_test(text: str, predicate: str) -> tuple[str, str] | None:
  """Returns the comparison and the operands of a branch's predicate; None where it has none."""
  if not predicate:
    return None
  compare = re.search(rf"%{predicate} = scmp\.(\w\w)\S* (%\w+, [%\w]+)", text)
  return (compare[1], compare[2]) if compare else None


def opposite(a: Span, b: Span) -> bool:
  """Tells whether one of the two regions runs exactly where the other does not."""
  return bool(a.test and b.test and a.test[1] == b.test[1] and {a.test[0], b.test[0]} in OPPOSITE)
