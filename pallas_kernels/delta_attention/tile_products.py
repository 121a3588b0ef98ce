"""Multiplies and cuts tiles in a TPU's vector memory; runs the steps of several heads in turn."""

# C positions of a chunk; tiles are float32 [rows, lanes]
from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_attention.chunk import halvings

ROWS = 8
"""Rows of a register of 32-bit numbers."""


class Tables(NamedTuple):
  """Holds constants of a chunk; kernels read them, since they may not capture arrays."""

  level_CC: Any  # int32: which halving parts i > j, see `chunk.halvings`; L: i = j, -1: i < j
  level_8C: Any  # int32: the same inside of each of C / 8 blocks of 8 positions, side by side
  sums: Any  # [C, (L + 2) C] of 0 and 1: adds the gradients of sums of log decays, side by side

  @property
  def dtype(self) -> Any:
    """Returns the dtype of operands of products."""
    return self.sums.dtype

  @property
  def levels(self) -> int:
    """Returns the number of halvings, L."""
    return self.level_CC.shape[0].bit_length() - 1


def make_tables(C: int, dtype: Any) -> Tables:
  """Returns the constants for chunks of C positions and products of this dtype."""
  sums, masks = halvings(C)
  level_CC = np.full((C, C), -1, np.int32)
  for level, mask_CC in enumerate(masks):
    level_CC[mask_CC] = level
  np.fill_diagonal(level_CC, len(masks))
  level_8C = np.concatenate(
    [level_CC[i : i + ROWS, i : i + ROWS] for i in range(0, C, ROWS)], axis=1
  )
  side_by_side = np.concatenate(list(sums.swapaxes(1, 2)), axis=1)
  return Tables(jnp.asarray(level_CC), jnp.asarray(level_8C), jnp.asarray(side_by_side, dtype))


def split_rows(x: jax.Array, size: int = ROWS) -> list[jax.Array]:
  """Returns the array in parts of `size` rows."""
  return [x[i : i + size] for i in range(0, x.shape[0], size)]


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
  """Returns x times the factor, or x without one."""
  return x if factor is None else x * factor


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
  """Contracts one axis of each; operands are `dtype`, sums float32."""
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(
    a.astype(dtype), b.astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32
  )


def rows_behind(level: int, groups: int) -> list[int]:
  """Returns the groups of 8 rows that have a row behind the middle of a block of 2^(level + 1)."""
  return [i for i in range(groups) if level < 3 or i >> (level - 3) & 1]


Steps = Generator[None, None, Any]


def in_turn(steps: list[Steps], delay: float = 0) -> Steps:
  """Runs generators in turn, up to the next `yield` of each; returns what they return.

  A compiler hides the latency of one product behind its neighbours in the program. Each generator
  starts `delay` rounds after the one before it, so that stages of different kind meet; a round
  begins with the youngest, whose stages wait for least.
  """
  results: list[Any] = [None] * len(steps)
  running, rounds = dict(enumerate(steps)), 0
  while running:
    for i, step in reversed(list(running.items())):
      if rounds < i * delay:
        continue
      try:
        next(step)
      except StopIteration as stop:
        results[i] = stop.value
        del running[i]
    rounds += 1
    yield
  return results


def slowed(steps: Steps, rounds: int) -> Steps:
  """Runs a generator that rests for so many rounds after each of its own; returns its result."""
  while True:
    try:
      next(steps)
    except StopIteration as stop:
      return stop.value
    for _ in range(1 + rounds):
      yield


def run(steps: Steps) -> Any:
  """Runs a generator to its end; returns its result."""
  while True:
    try:
      next(steps)
    except StopIteration as stop:
      return stop.value
