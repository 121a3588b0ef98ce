"""Reads the fields of a JSON object one by one, so that none is overlooked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from pallas_kernels.common.errors import UserError

LARGEST_INT = 2**31 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-12, 1e12


class Fields:
  """Holds the fields of one JSON object. Each is read once; `refuse_unread` raises for the rest."""

  def __init__(self, values: dict[str, Any], where: str):
    self._unread, self._where, self._known = dict(values), where, set[str]()

  def error(self, key: str, value: Any, rule: str) -> UserError:
    """Returns the error for a field with this value; its message begins with the file."""
    return UserError(f"{self._where}: {key}={str(value)[:200]!r}: {rule}")

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
        raise UserError(f"{self._where}: {key} is missing")
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

  def expect(self, key: str, expected: Any, rule: str) -> None:
    """Reads `key`; raises UserError unless it is missing, null, or exactly `expected`."""
    self._known.add(key)
    value = self._unread.pop(key, None)
    same = value == expected and isinstance(value, bool) == isinstance(expected, bool)
    if value is not None and not same:
      raise self.error(key, value, rule)

  def refuse_unread(self, ignored_fields: Iterable[str] = ()) -> None:
    """Raises UserError for a field that was not read, unless it is null or in `ignored_fields`."""
    for key, value in self._unread.items():
      if value is None or key in ignored_fields:
        continue
      nearest = difflib.get_close_matches(key[:100], self._known, n=1)
      hint = f"; nearest: {nearest[0]}" if nearest else ""
      raise self.error(key[:100], value, f"unknown, and may change the numbers{hint}")
