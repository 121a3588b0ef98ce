"""Swaps shards of the sequence for shards of the heads, attends to whole rows, and swaps back.

Source: DeepSpeed-Ulysses, arXiv 2309.14509; key heads that are fewer than devices are repeated as
in Arctic Long Sequence Training, arXiv 2506.13996.
"""

# B batch, T positions of a shard, S positions of the whole row, N query heads, K key heads,
# H width of queries and keys, U width of values, Z any width
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check
from sharding.context.order import ULYSSES
from sharding.context.parts import Rows, Variant, attend_to_rows


def ulysses_attention_shard(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  rows: Rows,
  variant: Variant,
) -> jax.Array:
  """Returns attention of this device's shards, inside shard_map over `context_ulysses`.

  Device i holds the i-th part of each row, in the row's own order whatever `variant.order` is.
  Four all-to-alls, and four in the backward pass.
  """
  shards = swap_to_heads(q_BTNH, k_BTKH, v_BTKU)
  return swap_to_length(attend_to_rows(*shards, rows, variant))


def check_heads(N: int, K: int, ulysses: int) -> None:
  """Raises UserError unless N query heads and K key heads of a device can be swapped."""
  rule = f"query heads on each device must be a multiple of context_ulysses={ulysses}"
  check(N % ulysses == 0, "N", N, rule)
  rule = f"key heads on each device must be a multiple or a divisor of context_ulysses={ulysses}"
  check(K % ulysses == 0 or ulysses % K == 0, "K", K, rule)


def swap_to_heads(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns rows that this device has all of, with its part of the heads: three all-to-alls.

  Where the axis has more devices than there are key heads, a key head is sent to all devices whose
  queries need it. Raises UserError for heads that cannot be split.
  """
  ulysses, K = jax.lax.axis_size(ULYSSES), k_BTKH.shape[2]
  check_heads(q_BTNH.shape[2], K, ulysses)
  if ulysses == 1:
    return q_BTNH, k_BTKH, v_BTKU
  if ulysses > K:
    k_BTKH = jnp.repeat(k_BTKH, ulysses // K, axis=2)
    v_BTKU = jnp.repeat(v_BTKU, ulysses // K, axis=2)

  def swap(x_BTNZ: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x_BTNZ, ULYSSES, split_axis=2, concat_axis=1, tiled=True)

  return swap(q_BTNH), swap(k_BTKH), swap(v_BTKU)


def swap_to_length(o_BSNU: jax.Array) -> jax.Array:
  """Returns this device's part of the rows, with all heads: one all-to-all."""
  if jax.lax.axis_size(ULYSSES) == 1:
    return o_BSNU
  return jax.lax.all_to_all(o_BSNU, ULYSSES, split_axis=1, concat_axis=2, tiled=True)
