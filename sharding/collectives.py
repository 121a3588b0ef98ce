"""Reads the collectives of a compiled program: kind, mesh axes, bytes and the loops around them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\(")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation|branch_computations|"
  r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """Describes one array that a collective sends; the compiler joins arrays into one operation."""

  kind: str
  """one of `KINDS`"""
  axes: tuple[str, ...]
  """mesh axes that it crosses, in mesh order"""
  group: int
  """devices that exchange with each other; of a permutation, the devices of these axes"""
  dtype: str
  """as the compiler writes it: f32, bf16, s32, ..."""
  shape: tuple[int, ...]
  """of the result on one device"""
  loops: tuple[int | None, ...]
  """trip counts of the loops around it, outermost first; None where the program does not say"""
  conditional: bool
  """whether it stands in a branch that not every execution takes"""
  source: str
  """path of the operation in the traced program; empty where the compiler made it"""

  @property
  def depth(self) -> int:
    """Returns the number of loops around it."""
    return len(self.loops)

  @property
  def times(self) -> int | None:
    """Returns how often an execution of the program runs it (at most, if it is conditional)."""
    trips = [trip for trip in self.loops if trip is not None]
    return math.prod(trips) if len(trips) == self.depth else None

  @property
  def result_bytes(self) -> float:
    """Returns the bytes of the result on one device."""
    return math.prod(self.shape) * element_bytes(self.dtype)

  @property
  def bytes(self) -> float:
    """Returns the bytes of the array on one device where it is larger.

    That is what an all-gather gives and a reduce-scatter takes: V in `sharding.roofline`.
    """
    return self.result_bytes * (self.group if self.kind == "reduce-scatter" else 1)


def element_bytes(dtype: str) -> float:
  """Returns the bytes of one element of a type as the compiler writes it, such as "bf16"."""
  if dtype == "pred":
    return 1
  bits = re.search(r"\d+", dtype)
  return int(bits[0]) / 8 if bits else 0


def read_collectives(program: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """Returns the collectives of a program's text, `compiled.as_text()`, in the order of the calls.

  `mesh_shape` gives axis name -> size of the mesh that it was compiled for. A reduce-scatter that
  the TPU compiler writes as a fusion is one, and so is an all-gather that it spreads over several
  fusions. Collectives among single devices are left out.
  """
  return list(_Program(program, mesh_shape).visit())


class _Program:
  """Walks the computations of a program from its entry."""

  def __init__(self, text: str, mesh_shape: Mapping[str, int]):
    self.mesh_shape = dict(mesh_shape)
    self.computations: dict[str, list[str]] = {}
    self.entry = ""
    self.chains: set[str] = set()
    lines: list[str] = []
    for line in text.splitlines():
      if header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line):
        lines = self.computations[header[2]] = []
        self.entry = header[2] if header[1] else self.entry
      elif line.startswith(" "):
        lines.append(line)

  def visit(
    self, name: str | None = None, loops: tuple[int | None, ...] = (), conditional: bool = False
  ) -> Iterator[Collective]:
    """Yields the collectives of a computation, by default the entry, and of those that it calls."""
    for line in self.computations.get(self.entry if name is None else name, ()):
      if not (instruction := _INSTRUCTION.match(line)):
        continue
      result, op = instruction["type"], instruction["op"]
      if op == "while":
        bodies = re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
        for body in bodies:
          yield from self.visit(body, (*loops, self.trip_count(line)), conditional)
        continue
      if op in ("async-update", "async-done"):  # of what async-start calls
        continue
      if match := _COLLECTIVE.fullmatch(op):
        kind, source = match[1], line
        result = _result_of_start(kind, result) if match[2] else result
      elif op == "fusion" and (fused := re.search(r"calls=%?(all-reduce-scatter[\w.\-]*)", line)):
        kind = "reduce-scatter"
        source = next(x for x in self.computations[fused[1]] if " all-reduce(" in x)
      else:
        for names in _CALLED.findall(line):
          for called in re.findall(r"[\w.\-]+", names):
            yield from self.visit(called, loops, conditional or op == "conditional")
        continue
      yield from self.read(kind, result, source, line, loops, conditional)

  def read(
    self,
    kind: str,
    result: str,
    source: str,
    line: str,
    loops: tuple[int | None, ...],
    conditional: bool,
  ) -> Iterator[Collective]:
    """Yields one collective for each array of the result type of one instruction."""
    if chain := re.search(r'chain_id="?(\d+)', source):  # parts of one collective share it
      if chain[1] in self.chains:
        return
      self.chains.add(chain[1])
    axes, group = self.crossed_axes(source)
    if group == 1:
      return
    path = re.search(r'op_name="([^"]*)"', line)
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result):
      yield Collective(
        kind=kind,
        axes=axes,
        group=group,
        dtype=dtype,
        shape=tuple(int(d) for d in dims.split(",") if d),
        loops=loops,
        conditional=conditional,
        source=path[1] if path else "",
      )

  def trip_count(self, line: str) -> int | None:
    """Returns how often a while loop runs, if it counts up from 0 by 1 as `jax.lax.scan` does."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
      return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = self.computations.get(condition[1], []) if condition else []
    limits = [m[1] for x in lines if (m := re.search(r" s32\[\]\S* constant\((\d+)\)", x))]
    below = any(" compare(" in x and "direction=LT" in x for x in lines)
    return int(limits[0]) if below and len(limits) == 1 else None

  def crossed_axes(self, line: str) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes along which members of a group differ, and the size of a group."""
    sizes = tuple(self.mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    members = _groups(pairs[1] + "}") if pairs else _replica_groups(line, math.prod(sizes))
    coordinates = np.stack(np.unravel_index(members, sizes), axis=-1)
    differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    axes = tuple(name for name, is_crossed in zip(self.mesh_shape, differs) if is_crossed)
    group = math.prod(self.mesh_shape[axis] for axis in axes) if pairs else members.shape[1]
    return axes, group


def _result_of_start(kind: str, type_: str) -> str:
  """Returns the result among (operands, result, ...), the type of an operation that starts."""
  if kind == "all-reduce" or not type_.startswith("("):
    return type_
  depth, parts = 0, [""]
  for character in type_[1:-1]:
    depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  return parts[1]


def _groups(text: str) -> np.ndarray:
  """Returns "{0,1},{2,3}" as an array [groups, members]."""
  return np.array([[int(i) for i in ids.split(",")] for ids in re.findall(r"\{([\d,]+)\}", text)])


def _replica_groups(line: str, devices: int) -> np.ndarray:
  """Returns the groups of a collective, device numbers [groups, members], in any notation of XLA.

  They are lists, `[groups,members]<=[shape]T(order)` of the numbered devices, or axes of a mesh.
  """
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
    return _groups(listed[1])
  if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
    shape, order = iota[1].split("<=")
    return _numbered(order).reshape(_ints(shape))
  if mesh := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", line
  ):
    return _groups_of_mesh(mesh[1], mesh[2], mesh[3])
  return np.arange(devices)[None]


def _groups_of_mesh(axes: str, device_ids: str | None, crossed: str) -> np.ndarray:
  """Returns groups written as axes of a mesh: `'a'=4,'b'=2`, an order of devices, and `'b'`.

  `'a':(2)2` is the part of axis a that has 2 values before it and 2 of its own.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values())) if device_ids is None else _numbered(device_ids)
  wanted: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", crossed):
    wanted.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
  shape: list[int] = []
  members: list[int] = []
  for name, size in sizes.items():
    done = 1
    for before, own in sorted(wanted.get(name, [])):
      shape.append(before // done)
      members.append(len(shape))
      shape.append(own)
      done = before * own
    shape.append(size // done)
  grid = ids.reshape(shape)
  others = [axis for axis in range(grid.ndim) if axis not in members]
  group = math.prod(shape[axis] for axis in members)
  return grid.transpose(*others, *members).reshape(-1, group)


def _numbered(order: str) -> np.ndarray:
  """Returns `[4,2]T(1,0)`: the device numbers in this shape, transposed, as a flat array."""
  shape, _, axes = order.partition("T")
  shape = shape or order
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return (ids.transpose(_ints(axes)) if axes else ids).reshape(-1)


def _ints(text: str) -> Any:
  return tuple(int(i) for i in re.findall(r"\d+", text))
