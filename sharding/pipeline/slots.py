"""Keeps what a rank holds of its micro-batches, in slots that the programs of its stages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def entry_of(array: jax.Array, index: jax.Array) -> jax.Array:
  """Returns one entry of the leading axis."""
  return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


class Slots:
  """Keeps arrays of several programs in common buffers, each of a number of slots.

  Arrays of one type share a buffer across programs, as only one program holds a slot.
  """

  def __init__(self, programs: Sequence[Sequence[Any]], slots: int):
    self.types: list[tuple[tuple[int, ...], Any, frozenset[str]]] = []
    self.places = [self._place(types) for types in programs]
    self.slots = slots

  def _place(self, types: Sequence[Any]) -> list[int]:
    places: list[int] = []
    for array in types:
      kind = (array.shape, array.dtype, frozenset(array.mat.varying))
      unused = [i for i, other in enumerate(self.types) if other == kind and i not in places]
      if not unused:
        self.types.append(kind)
      places.append(unused[0] if unused else len(self.types) - 1)
    return places

  def empty(self) -> list[jax.Array]:
    """Returns the buffers, [slots, ...] each."""
    return [
      jax.lax.pcast(jnp.zeros((self.slots, *shape), dtype), tuple(axes), to="varying")
      for shape, dtype, axes in self.types
    ]

  def write(self, buffers: list, program: int, slot: jax.Array, arrays: Sequence) -> list:
    """Returns the buffers with one program's arrays in a slot."""
    buffers = list(buffers)
    for place, array in zip(self.places[program], arrays, strict=True):
      buffers[place] = jax.lax.dynamic_update_index_in_dim(buffers[place], array, slot, 0)
    return buffers

  def read(self, buffers: list, program: int, slot: jax.Array) -> list[jax.Array]:
    """Returns one program's arrays in a slot."""
    return [entry_of(buffers[place], slot) for place in self.places[program]]
