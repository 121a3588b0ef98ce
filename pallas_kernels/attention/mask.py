"""Says which keys a query sees and how its logits are bent, for all implementations."""

# B batch, T query positions, S key positions
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
  """Says where queries and keys stand. None: in order, last query at last key; one segment."""

  q_positions_BT: jax.Array | None = None  # int32; [1, T] where all rows stand alike
  k_positions_BS: jax.Array | None = None
  q_segment_ids_BT: jax.Array | None = None
  k_segment_ids_BS: jax.Array | None = None

  @property
  def in_order(self) -> bool:
    """Returns whether query i stands at position S - T + i, and key j at position j."""
    return self.q_positions_BT is None


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds the arguments of `attention` that are no arrays, checked."""

  causal: bool
  window: int | None
  cap: float | None
  scale: float
  interpret: Any = False  # bool, or the interpreter's parameters


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """Returns cap tanh(x / cap), within (-cap, cap); x itself without a cap.

  Source: Gemma 2, arXiv 2408.00118, section 2.
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def with_positions(tokens: Tokens, T: int, S: int) -> Tokens:
  """Returns the tokens with their positions written out, [1, T] and [1, S] where they were None."""
  if not tokens.in_order:
    return tokens
  q_1T = jnp.arange(S - T, S, dtype=jnp.int32)[None]
  k_1S = jnp.arange(S, dtype=jnp.int32)[None]
  return tokens._replace(q_positions_BT=q_1T, k_positions_BS=k_1S)


def visible(tokens: Tokens, options: Options) -> jax.Array | None:
  """Returns bool [B or 1, T, S], true where the query sees the key, or None: all see all.

  A query sees keys of its own segment and, under `causal`, those at most `window` - 1 positions
  before it and none after it. `tokens` have positions.
  """
  q_positions_BT, k_positions_BS, q_segment_ids_BT, k_segment_ids_BS = tokens
  mask_BTS = None
  if options.causal and q_positions_BT is not None and k_positions_BS is not None:
    ahead_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    mask_BTS = ahead_BTS >= 0
    if options.window is not None:
      mask_BTS = mask_BTS & (ahead_BTS < options.window)
  if q_segment_ids_BT is not None and k_segment_ids_BS is not None:
    same_BTS = q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None, :]
    mask_BTS = same_BTS if mask_BTS is None else mask_BTS & same_BTS
  return mask_BTS
