"""Taking a configuration file apart field by field, so that nothing in it is overlooked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

LARGEST = 2**31 - 1
FRACTIONS = (1e-12, 1e12)


class Fields:
  """The keys of one JSON object; each is taken once, and `finish` complains about what nobody took."""

  def __init__(self, values: dict[str, Any], where: str):
    self._left, self._where, self._known = dict(values), where, set[str]()

  def fail(self, key: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"{self._where}: {key}={str(value)[:200]!r}: {rule}")

  def take(
    self, key: str, kind: type, default: Any = ..., *, optional: bool = False, least: int = 1
  ) -> Any:
    """The value of `key`, of this type (int counts as float); `default` where it is missing.

    Without a default the key must be there. null is read as None and needs `optional`. Whole numbers lie in
    `least` .. 2^31 - 1, fractional ones in 1e-12 .. 1e12.
    """
    self._known.add(key)
    if key not in self._left:
      if default is ...:
        raise ValueError(f"{self._where}: {key} is missing")
      return default
    value = self._left.pop(key)
    if value is None and optional:
      return None
    if kind is float and type(value) is int:
      value = float(value) if abs(value) <= LARGEST else math.inf
    if not _is(value, kind):
      raise self.fail(key, value, f"must be of type {kind.__name__}")
    if kind is int and not least <= value <= LARGEST:
      raise self.fail(key, value, f"must lie in {least} .. {LARGEST}")
    if kind is float and not FRACTIONS[0] <= value <= FRACTIONS[1]:
      raise self.fail(key, value, f"must lie in {FRACTIONS[0]:g} .. {FRACTIONS[1]:g}")
    return value

  def expect(self, key: str, value: Any, why: str) -> None:
    """Takes `key`, which must be missing, null, or exactly this value."""
    self._known.add(key)
    found = self._left.pop(key, None)
    if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
      raise self.fail(key, found, why)

  def finish(self, harmless: Iterable[str] = ()) -> None:
    """ValueError for a key that is neither taken, nor null, nor among the ones that change no number."""
    unknown = {
      key: value for key, value in self._left.items() if value is not None and key not in harmless
    }
    for key, value in unknown.items():
      near = difflib.get_close_matches(key[:100], self._known, n=1)
      raise self.fail(
        key[:100],
        value,
        "unknown, and may change the numbers" + (f"; nearest: {near[0]}" if near else ""),
      )


def _is(value: Any, kind: type) -> bool:
  return type(value) is kind  # not isinstance: true and false are no integers
