"""Recognises files and folders that are named as splits of a dataset: train, validation, test."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxlm.data.formats import ENDINGS
from jaxlm.data.parts import Part

Role = Literal["train", "validation", "test"]
TRAIN: Role = "train"
ROLES: dict[str, Role] = {
  "train": "train",
  "training": "train",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
  "heldout": "validation",
  "dev": "validation",
  "test": "test",
}
AMBIGUOUS = ("dev", "test")  # mean a split only where something is named train
CODE = (".py", ".md")  # train.py and test.py are programs
_NUMBERS = re.compile(r"\d+-of-\d+|\d+")


def find_roles(names: Sequence[str]) -> list[Role | None]:
  """Returns the role of each file, given paths below the source, by its outermost split word.

  A folder or file has a role if its name, without numbers and ending, is a split word (Train,
  val_0), or differs by its split word alone from one beside it (wiki.train.txt, wiki.valid.txt).
  `dev` and `test` alone, without anything named train, mean nothing, nor do names of programs.
  """
  parts = {part for name in names for part in _named_parts(name)}
  trains = {(part.folder, part.rest) for part in parts if ROLES[part.word] == "train"}
  others = {(part.folder, part.rest) for part in parts if ROLES[part.word] != "train"}
  pairs = trains & others
  has_train = bool(pairs) or any(not rest for _, rest in trains)

  def role(name: str) -> Role | None:
    for part in _named_parts(name):
      alone = not part.rest and not name.lower().endswith(CODE)
      alone = alone and (has_train or part.word not in AMBIGUOUS)
      if alone or (part.folder, part.rest) in pairs:
        return ROLES[part.word]
    return None

  return [role(name) for name in names]


def split_by_name(parts: tuple[Part, ...]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
  """Returns the parts with the sides that their names say, and notes; as they are without any.

  Where there is a validation split, it is held out and a test split is left out; else the test
  split is held out. Where something is named train, what has no such name is left out.
  """
  groups = _group_by_role(parts)
  train = TRAIN if TRAIN in groups else None
  heldout = "validation" if "validation" in groups else "test"
  if train not in groups or heldout not in groups:
    return parts, ()
  chosen = [dataclasses.replace(part, side="train") for part in groups[train]]
  chosen += [dataclasses.replace(part, side="heldout") for part in groups[heldout]]
  note = f"held out by name (not so with data.heldout='none'): {_list(groups[heldout])}"
  return tuple(chosen), (note, *_left_out(groups, {train, heldout}))


def training_parts(parts: tuple[Part, ...]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
  """Returns the parts to train on, where something else is held out, and notes on the others.

  These are the parts that are not named validation or test; of those, the ones named train where
  there are any.
  """
  groups = _group_by_role(parts)
  train = TRAIN if TRAIN in groups else None
  if train not in groups:  # all are named validation or test
    return tuple(dataclasses.replace(part, side="train") for part in parts), ()
  chosen = tuple(dataclasses.replace(part, side="train") for part in groups[train])
  return chosen, tuple(_left_out(groups, {train}))


def _group_by_role(parts: Sequence[Part]) -> dict[Role | None, list[Part]]:
  groups = dict[Role | None, list[Part]]()
  for part, role in zip(parts, find_roles([part.name for part in parts])):
    groups.setdefault(role, []).append(part)
  return groups


def _left_out(groups: dict[Role | None, list[Part]], used: set[Role | None]) -> list[str]:
  return [
    f"left out, being named {role or 'no part of the split'}: {_list(group)}"
    for role, group in groups.items()
    if role not in used
  ]


def _list(parts: Sequence[Part]) -> str:
  """Returns the names of up to three parts, and how many there are where they are more."""
  names = ", ".join(part.name for part in parts[:3])
  return names if len(parts) <= 3 else f"{names}, ... ({len(parts)} files)"


class _NamedPart(NamedTuple):
  """Is a folder or file on a path whose name has a split word in it."""

  folder: str
  """The path before it."""
  rest: str
  """Its name with a star for the split word; empty where nothing else is in the name."""
  word: str


def _named_parts(name: str) -> list[_NamedPart]:
  """Returns the parts of a path that have a split word, the outermost first."""
  parts, lower = list[_NamedPart](), name.lower()
  ending = max((ending for ending in ENDINGS if lower.endswith(ending)), key=len, default="")
  *folders, file = lower.removesuffix(ending).split("/")
  components = folders if lower.endswith(CODE) else [*folders, file]
  for depth, component in enumerate(components):
    component = _NUMBERS.sub("", component)
    for match in re.finditer("[a-z]+", component):
      if match[0] in ROLES:
        rest = f"{component[: match.start()]}*{component[match.end() :]}"
        rest = rest if re.search("[a-z]", rest) else ""
        parts.append(_NamedPart("/".join(folders[:depth]), rest, match[0]))
  return parts
