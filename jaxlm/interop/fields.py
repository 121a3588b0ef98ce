"""Reads the fields of a JSON object one by one, so that none is overlooked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.common.errors import UserError

LARGEST_INT = 2**31 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-12, 1e12


class Fields:
  """Holds the fields of one JSON object. Each is read once; `refuse_unread` raises for the rest.

  Errors begin with `file`, and name a field by its path in it: `prefix`, then its key.
  """

  def __init__(self, values: dict[str, Any], file: str, prefix: str = ""):
    self._unread, self._file, self._prefix = dict(values), file, prefix
    self._known = set[str]()

  def error(self, key: str, value: Any, rule: str) -> UserError:
    """Returns the error for a field with this value; its message begins with the file."""
    return UserError(f"{self._file}: {self._prefix}{key}={str(value)[:200]!r}: {rule}")

  def read(
    self, key: str, kind: type, default: Any = ..., *, optional: bool = False, least: int = 1
  ) -> Any:
    """Returns the value of `key`, of type `kind` (an int counts as a float), or `default`.

    Raises UserError for a missing key without a default, for null unless `optional`, for another
    type, for ints outside `least` .. 2^31 - 1 and floats outside 1e-12 .. 1e12.
    """
    self._known.add(key)
    if key not in self._unread:
      if default is ...:
        raise UserError(f"{self._file}: {self._prefix}{key} is missing")
      return default
    value = self._unread.pop(key)
    if value is None and optional:
      return None
    if kind is float and type(value) is int:
      value = float(value) if abs(value) <= LARGEST_INT else math.inf
    right_type = type(value) is kind  # not isinstance: true and false are no integers
    if not right_type:
      raise self.error(key, value, f"must be of type {kind.__name__}")
    if kind is int and not least <= value <= LARGEST_INT:
      raise self.error(key, value, f"must lie in {least} .. {LARGEST_INT}")
    if kind is float and not SMALLEST_FLOAT <= value <= LARGEST_FLOAT:
      raise self.error(key, value, f"must lie in {SMALLEST_FLOAT:g} .. {LARGEST_FLOAT:g}")
    return value

  def expect(self, key: str, expected: Any, rule: str) -> Any:
    """Returns the value of `key`; UserError unless it is missing, null, or exactly `expected`."""
    self._known.add(key)
    value = self._unread.pop(key, None)
    same = value == expected and isinstance(value, bool) == isinstance(expected, bool)
    if value is not None and not same:
      raise self.error(key, value, f"{rule} ({self._way_on(key)})")
    return value

  def refuse_unread(
    self,
    is_harmless: Callable[[str, Any], bool],
    reasons: Mapping[str, str] | None = None,
  ) -> None:
    """Raises UserError for a field that was not read, unless it `is_harmless`(key, value).

    The message gives the reason from `reasons`, if there is one, and the flag that leaves it out.
    """
    for key, value in self._unread.items():
      if is_harmless(key, value):
        continue
      nearest = difflib.get_close_matches(key[:100], self._known, n=1)
      hint = f"; nearest: {nearest[0]}" if nearest else ""
      reason = (reasons or {}).get(key, f"unknown, and may change the numbers{hint}")
      raise self.error(key[:100], value, f"{reason} ({self._way_on(key[:100])})")

  def _way_on(self, key: str) -> str:
    return f"--ignore_config {self._prefix}{key} reads the rest without it"


def drop_fields(values: dict[str, Any], keys: tuple[str, ...], file: str) -> dict[str, Any]:
  """Returns a JSON object without the fields `keys`, each a key or outer.inner.

  Raises UserError for a key that is not there, which may be a misspelt one.
  """
  for key in keys:
    outer, _, inner = key.partition(".")
    nested = values.get(outer)
    if inner and isinstance(nested, dict) and inner in nested:
      values = values | {outer: {name: nested[name] for name in nested if name != inner}}
    elif not inner and outer in values:
      values = {name: values[name] for name in values if name != outer}
    else:
      raise UserError(f"ignore_config={key!r}: {file} has no such key")
  return values
