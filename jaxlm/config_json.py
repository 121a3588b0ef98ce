"""Configurations as JSON and back: what config.json holds, and what is wrong with one that somebody edited."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import typing
from typing import Any, Literal

from jaxlm.config import check
from pallas_kernels.common.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration as plain dicts, lists and scalars (what config.json holds)."""
  return dataclasses.asdict(config)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
  return typing.get_type_hints(kind)


def from_dict(kind: Any, values: dict[str, Any], path: str = "") -> Any:
  """Rebuilds a configuration from `to_dict`'s form.

  ValueError names an unknown field and the nearest known ones, and a value that is of another type.
  """
  hints = _hints(kind)
  arguments = {}
  for name, value in values.items():
    if name not in hints:
      near = ", ".join(difflib.get_close_matches(name, hints, n=3) or hints)
      raise UserError(f"{path}{name}={value!r}: no such field; nearest: {near}")
    if dataclasses.is_dataclass(hints[name]):
      check(isinstance(value, dict), f"{path}{name}", value, "must be a group of fields")
      arguments[name] = from_dict(typing.cast(type, hints[name]), value, f"{path}{name}.")
    else:
      value = tuple(value) if isinstance(value, list) else value
      if not _is_of(hints[name], value):
        check(False, f"{path}{name}", value, f"must be {_words(hints[name])}")
      arguments[name] = value
  return kind(**arguments)


def _is_of(hint: Any, value: Any) -> bool:
  """Whether a value read from JSON fits a field's type: int, float, str, bool, Literal, union or tuple of these."""
  parts = typing.get_args(hint)
  if typing.get_origin(hint) is Literal:
    return any(type(value) is type(part) and value == part for part in parts)
  if typing.get_origin(hint) is tuple:
    return isinstance(value, tuple) and all(_is_of(parts[0], part) for part in value)
  if parts:
    return any(_is_of(part, value) for part in parts)
  if hint is float:
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
  return type(value) is hint


def _words(hint: Any) -> str:
  """A field's type as a message says it."""
  parts = typing.get_args(hint)
  if typing.get_origin(hint) is Literal:
    return "one of " + ", ".join(map(str, parts))
  if typing.get_origin(hint) is tuple:
    return f"a list, each {_words(parts[0])}"
  names = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
  }
  return " or ".join(map(_words, parts)) if parts else names[hint]
