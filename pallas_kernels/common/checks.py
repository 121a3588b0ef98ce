"""Checks arguments. Every error names the argument, its value and the rule. Imports no jax."""

from __future__ import annotations

import math
import numbers
from typing import Any

from pallas_kernels.common.errors import UserError


def check(good: bool, argument: str, value: Any, rule: str) -> None:
  """Raises UserError "argument=value: rule" unless `good`."""
  if not good:
    raise UserError(f"{argument}={value!r}: {rule}")


def check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
  """Raises UserError unless `value` is one of `choices`, and lists them."""
  check(value in choices, argument, value, f"must be one of {', '.join(map(repr, choices))}")


def check_number(
  argument: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf
) -> None:
  """Raises UserError unless `value` is a finite number, known at trace time, within the bounds."""
  check(is_number(value), argument, value, "must be a finite number, known when traced")
  check(value > above, argument, value, f"must be above {above}")
  check(value >= at_least, argument, value, f"must be at least {at_least}")


def is_number(value: Any) -> bool:
  """Tells whether `value` is a finite real number; neither bool nor a traced array is one."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_shape(argument: str, array: Any, shape: tuple[int | None, ...]) -> None:
  """Raises UserError unless the array has this shape; None stands for any size."""
  good = array.ndim == len(shape) and all(
    want is None or size == want for size, want in zip(array.shape, shape)
  )
  wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
  check(good, f"{argument}.shape", tuple(array.shape), f"must be {wanted}")


def check_dtype(argument: str, array: Any, kind: Any) -> None:
  """Raises UserError unless the dtype is `kind` or, for a class such as jnp.floating, below it."""
  from jax import dtypes  # here, so that configurations can be checked without loading jax

  good = dtypes.issubdtype(array.dtype, kind)
  name = kind.__name__ if isinstance(kind, type) else str(kind)
  check(good, f"{argument}.dtype", str(array.dtype), f"must be {name}")
