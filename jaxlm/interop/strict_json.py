"""Reads JSON of untrusted files: bounded in size, without duplicate names or NaN."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.data.placeholder import find_placeholder
from pallas_kernels.common.errors import UserError


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
  """Returns the JSON object in a file; raises UserError, naming the file and the rule."""
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  if path.stat().st_size > max_bytes:
    raise UserError(f"{path}: {path.stat().st_size:,} bytes, at most {max_bytes:,} are read")
  content = path.read_bytes()
  if (placeholder := find_placeholder(content)) is not None:
    raise UserError(f"{path}: is {placeholder.description}")
  return parse_object(content, str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
  """Returns the JSON object that `text` spells; raises UserError that begins with `where`."""
  try:
    decoded = text.decode("utf-8-sig")
    value = json.loads(
      decoded, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
    )
  except RecursionError:
    raise UserError(f"{where}: JSON is nested too deeply") from None
  except ValueError as error:  # bad JSON, bad UTF-8, integers of thousands of digits
    raise UserError(f"{where}: not valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{where}: must hold one JSON object")
  return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    ((duplicate, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"duplicate name {duplicate[:100]!r}")
  return values


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is not a JSON number")
