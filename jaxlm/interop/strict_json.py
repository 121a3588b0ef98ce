"""JSON of untrusted files: bounded in size, without duplicate keys, NaN or surprises."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any, NoReturn


def read_object(path: Path, limit: int) -> dict[str, Any]:
  """The object that a file of at most `limit` bytes holds; ValueError names the file and the rule."""
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  if path.stat().st_size > limit:
    raise ValueError(f"{path}: {path.stat().st_size:,} bytes, at most {limit:,} are read")
  return parse_object(path.read_bytes(), str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
  """The object that `text` spells; ValueError begins with `where`."""
  try:
    value = json.loads(
      text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
    )
  except RecursionError:
    raise ValueError(f"{where}: JSON is nested too deeply") from None
  except (
    ValueError
  ) as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
    raise ValueError(f"{where}: not valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{where}: must hold one JSON object")
  return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"duplicate name {twice[:100]!r}")
  return found


def _no_constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is not a JSON number")
