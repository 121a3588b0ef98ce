"""Turns configurations into JSON and back, and says what is wrong with an edited config.json.

A dataclass becomes an object of its fields, a tuple a list. Where a field may hold one of several
dataclasses, the object says which by the key "kind"; without it, it is the kind of the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import typing
from typing import Any, Literal

from jaxlm.config import check

KIND = "kind"


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a configuration as plain dicts, lists and scalars (what config.json holds)."""
  kind: Any = type(config)
  hints = _hints(kind)
  return {name: _to_plain(hint, getattr(config, name)) for name, hint in hints.items()}


def _to_plain(hint: Any, value: Any) -> Any:
  if isinstance(value, tuple):
    part = typing.get_args(hint)[0]
    return [_to_plain(part, entry) for entry in value]
  if not dataclasses.is_dataclass(value):
    return value
  kind = {KIND: type(value).__name__} if len(_dataclasses_in(hint)) > 1 else {}
  return kind | to_dict(value)


def from_dict(kind: Any, values: dict[str, Any], path: str = "") -> Any:
  """Rebuilds a configuration from `to_dict`'s form.

  Raises UserError, which names an unknown field and the nearest known ones, or a value that is of
  another type.
  """
  hints, arguments = _hints(kind), {}
  defaults = {field.name: type(field.default).__name__ for field in dataclasses.fields(kind)}
  for name, value in values.items():
    if name not in hints:
      near = ", ".join(difflib.get_close_matches(name, hints, n=3) or hints)
      check(False, f"{path}{name}", value, f"no such field; nearest: {near}")
    arguments[name] = _from_plain(hints[name], value, f"{path}{name}", defaults[name])
  return kind(**arguments)


def _from_plain(hint: Any, value: Any, path: str, default_kind: str | None = None) -> Any:
  kinds = _dataclasses_in(hint)
  if kinds and not (value is None and type(None) in typing.get_args(hint)):
    check(isinstance(value, dict), path, value, "must be a group of fields")
    if len(kinds) == 1:
      return from_dict(next(iter(kinds.values())), value, f"{path}.")
    name = value.get(KIND, default_kind if default_kind in kinds else None)
    check(
      isinstance(name, str) and name in kinds,
      f"{path}.{KIND}",
      name,
      f"must be one of {', '.join(kinds)}",
    )
    rest = {key: part for key, part in value.items() if key != KIND}
    return from_dict(kinds[name], rest, f"{path}.")
  if typing.get_origin(hint) is tuple and isinstance(value, list):
    part = typing.get_args(hint)[0]
    if _dataclasses_in(part):
      return tuple(_from_plain(part, entry, f"{path}.{i}") for i, entry in enumerate(value))
    value = tuple(value)
  check(_is_of(hint, value), path, value, f"must be {_describe(hint)}")
  return value


def flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
  """Returns `to_dict`'s scalars by their paths, as in "model.pattern.0.mixer.N"."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, list) and value and isinstance(value[0], dict):
      value = {str(position): entry for position, entry in enumerate(value)}
    if isinstance(value, dict):
      flat |= flatten(value, f"{path}{name}.")
    else:
      flat[f"{path}{name}"] = value
  return flat


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
  """Returns the types of a dataclass's fields; what all of its instances share is none of them."""
  hints = typing.get_type_hints(kind)
  return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _dataclasses_in(hint: Any) -> dict[str, Any]:
  """Returns the dataclasses that a field of this type may hold itself, by name."""
  options = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
  kinds: list[Any] = [kind for kind in (hint, *options) if dataclasses.is_dataclass(kind)]
  return {kind.__name__: kind for kind in kinds}


def _is_of(hint: Any, value: Any) -> bool:
  """Returns whether a value from JSON fits a field's type, of int, float, str, bool and Literal.

  Unions and tuples of these count too.
  """
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


def _describe(hint: Any) -> str:
  """Returns a field's type in words, as a message says it."""
  parts = typing.get_args(hint)
  if typing.get_origin(hint) is Literal:
    return "one of " + ", ".join(map(str, parts))
  if typing.get_origin(hint) is tuple:
    return f"a list, each {_describe(parts[0])}"
  if parts:
    return " or ".join(map(_describe, parts))
  names = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
  }
  return names.get(hint, "a group of fields")
