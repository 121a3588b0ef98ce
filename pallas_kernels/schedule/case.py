"""Describes a kernel that the report covers: a function and the shapes that it is compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Holds a function to compile; `kernel` picks one of its Pallas calls by a part of the name."""

  name: str
  shape: str
  fn: Callable[..., Any]
  args: tuple[Any, ...]
  flops: float
  kernel: str = ""
  trips: tuple[float, ...] = ()
  """Of the kernel's loops whose bounds depend on data, assumed."""
  chips: tuple[str, ...] = ()
  """The chips that the case is for; none: all."""
  prepare: Callable[[], Any] | None = None
  """Builds what `fn` reads and what takes too long for a list of cases; before a mesh is set."""


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  """Returns the type of an array."""
  return jax.ShapeDtypeStruct(shape, dtype)
