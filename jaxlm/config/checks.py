"""Checks configuration fields. Every error names the field, its value and the rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pallas_kernels.common.checks import check

__all__ = ["check", "check_finite", "check_seed"]


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


def check_seed(seed: int) -> None:
  """Raises UserError for a seed that jax would cut to its last 32 bits without a word."""
  check(0 <= seed < 2**32, "seed", seed, "must be at least 0 and below 2**32")
