"""Says where queries stand, where their segments begin, and how large blocks are.

A segment stands in one piece and its blocks are counted from its own first token, so that rows of
several segments give what each gives alone. Since a query sees no later token, everything that
segments forbid follows from one number per query: the first token of its segment.
"""

# B batch, T query positions, S key positions, C compressed blocks
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """Holds the sizes of native sparse attention, in tokens (arXiv 2502.11089, section 4.1).

  `stride` must divide `length` and `block`, and `length` be at most `block`.
  """

  length: int = 32  # tokens of a compressed block, l
  stride: int = 16  # between the starts of compressed blocks, d
  block: int = 64  # tokens of a selected block, l'
  count: int = 16  # selected blocks of a query, n; with the first block and the last two
  window: int = 512  # keys of the window branch, w


PAPER_SIZES = BlockSizes()


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds the arguments of an operation that are no arrays, checked."""

  sizes: BlockSizes
  scale: float
  interpret: Any = False  # bool, or the interpreter's parameters


class Places(NamedTuple):
  """Says where queries stand among the keys, int32, [1, T] where all rows stand alike."""

  positions_BT: jax.Array  # -1: a query that sees nothing
  firsts_BT: jax.Array | None = None  # first token of the query's segment; None: all are 0

  def offsets_BT(self) -> jax.Array:
    """Returns how many tokens of its segment stand before each query; negative where none may."""
    return self.positions_BT if self.firsts_BT is None else self.positions_BT - self.firsts_BT

  def starts_BT(self) -> jax.Array:
    """Returns the first token of each query's segment."""
    return jnp.zeros_like(self.positions_BT) if self.firsts_BT is None else self.firsts_BT


def make_places(
  T: int, S: int, positions_BT: jax.Array | None, segment_ids_BS: jax.Array | None
) -> Places:
  """Returns the places of T queries among S keys; by default the last T, in one segment."""
  if positions_BT is None:
    positions_BT = jnp.arange(S - T, S, dtype=jnp.int32)[None]
  positions_BT = positions_BT.astype(jnp.int32)
  if segment_ids_BS is None:
    return Places(positions_BT)
  firsts_BS = segment_firsts(segment_ids_BS)
  rows = max(positions_BT.shape[0], firsts_BS.shape[0])
  positions_BT = jnp.broadcast_to(positions_BT, (rows, T))
  firsts_BS = jnp.broadcast_to(firsts_BS, (rows, S))
  at_BT = jnp.clip(positions_BT, 0, max(S - 1, 0))
  return Places(positions_BT, jnp.take_along_axis(firsts_BS, at_BT, axis=1))


def segment_firsts(segment_ids_BS: jax.Array) -> jax.Array:
  """Returns the place of the first token of each token's segment, int32 [B or 1, S]."""
  begins_BS = jnp.diff(segment_ids_BS, axis=1, prepend=segment_ids_BS[:, :1]) != 0
  at_BS = jnp.where(begins_BS, jnp.arange(begins_BS.shape[1], dtype=jnp.int32)[None], 0)
  return jax.lax.cummax(at_BS, axis=1)


def visible_blocks(places: Places, starts_BC: jax.Array, length: int) -> jax.Array:
  """Returns bool [B or 1, T, C]: whether the query sees all tokens of the compressed block."""
  starts_BTC = starts_BC[:, None, :]
  seen_BTC = starts_BTC + (length - 1) <= places.positions_BT[:, :, None]
  if places.firsts_BT is None:
    return seen_BTC
  return seen_BTC & (starts_BTC >= places.firsts_BT[:, :, None])
