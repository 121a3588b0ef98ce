"""Checks of configuration fields. Every error names the field, its value and the rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pallas_kernels.common.errors import UserError


def check(good: bool, field: str, value: Any, rule: str) -> None:
  """Raises UserError "field=value: rule" unless `good`."""
  if not good:
    raise UserError(f"{field}={value!r}: {rule}")


def check_finite(config: Any, path: str) -> None:
  """Raises UserError for a number among the fields that is not one, or is infinite."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    check(
      not isinstance(value, float) or math.isfinite(value),
      path + field.name,
      value,
      "must be a finite number",
    )
