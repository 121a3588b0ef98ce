"""Rounds keys and values as attention's cache keeps them, and rotates queries and keys before.

The rotation is R3 of SpinQuant (Liu et al. 2024, arXiv 2405.16406, section 3.2): after the rotary
embedding, by one Hadamard matrix for queries and keys, so that no score changes.
"""

# B batch, T positions, N query heads, K key heads, H head width

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxlm.config import QuantRule
from jaxlm.config.quant import shared_spec
from jaxlm.quant.apply import quantize, turn


def quantize_heads(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  rules: Sequence[QuantRule],
  layers: Sequence[int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries, keys and values as these layers' rules have them, in their dtypes.

  Gradients pass as the formats pass them.
  """
  if not rules:
    return q_BTNH, k_BTKH, v_BTKH
  keys = shared_spec(rules, [f"cache.{layer}.keys" for layer in layers])
  values = shared_spec(rules, [f"cache.{layer}.values" for layer in layers])
  q_BTNH, k_BTKH = (turn(x, keys.hadamard) for x in (q_BTNH, k_BTKH))
  return q_BTNH, quantize(k_BTKH, keys.activation), quantize(v_BTKH, values.activation)
