"""Finds the text field of records of JSON."""

from __future__ import annotations

import json
from typing import Any

from jaxlm.data.blocks import Fault

OTHER_FORMS = (
  "records that are not JSON",
  "records that are no objects",
  "records without the text field",
)


def parse_object(text: str, where: str) -> dict[str, Any]:
  """Returns the object that a line of JSON holds; Fault where it holds none."""
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    rule = f"not JSON: {error}; every line holds one object"
    raise Fault(OTHER_FORMS[0], f"{where}: {rule}") from error
  if not isinstance(record, dict):
    rule = f"is a {type(record).__name__}; every line holds one object"
    raise Fault(OTHER_FORMS[1], f"{where}: {rule}")
  return record


def field_of(record: dict[str, Any], field: str, where: str) -> Any:
  """Returns the value of a record's text field; Fault where it has none."""
  if field not in record:
    raise Fault(OTHER_FORMS[2], name_fields(where, field, list(record)))
  return record[field]


def name_fields(where: str, field: str, fields: list[str]) -> str:
  """Returns the message for a record, or a file of records, without the text field."""
  others = ", ".join(fields) or "none"
  return f"{where}: no field {field!r} (data.text_field); there are: {others}"
