"""Rounds keys and values for attention, and holds them in bytes in its cache.

Keys are rotated before, with the queries: R3 of SpinQuant (Liu et al. 2024, arXiv 2405.16406,
section 3.2), after the rotary embedding, by one Hadamard matrix, so that no score changes.
"""

# B batch, T positions, S positions of a cache, K key heads, H head width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxlm.config import MixerConfig, QuantRule
from jaxlm.config.quant import PLAIN, QuantSpec, cache_name, shared_spec
from jaxlm.quant.apply import quantize
from jaxlm.quant.packing import Packed, pack_weight, unpack_values

Specs = Mapping[str, QuantSpec]
"""How each part of a mixer's cache is rounded, by the names in `mixer.cached`."""
Held = jax.Array | Packed
"""[B, S, K, H], or the codes and scales of as many values, whose first three axes are these."""


def cache_specs(mixer: MixerConfig, rules: Sequence[QuantRule], layers: Sequence[int]) -> Specs:
  """Returns how these layers, which one module computes, round what their mixer keeps."""
  return {
    part: shared_spec(rules, [cache_name(layer, part) for layer in layers]) if rules else PLAIN
    for part in mixer.cached
  }


def round_heads(x_BTKH: jax.Array, spec: QuantSpec) -> jax.Array:
  """Returns values on the levels of their format, which are those that a cache in bytes gives.

  Every head of every position has scales of its own. Gradients pass as the format passes them.
  """
  return quantize(x_BTKH, spec.activation)


def hold(x_BTKH: jax.Array, spec: QuantSpec) -> Held:
  """Returns values as a cache holds them: as they are, or the codes and scales of their format."""
  return x_BTKH if spec.activation is None else pack_weight(x_BTKH, spec.activation)


def read(held: Held, spec: QuantSpec, H: int, dtype: str | jnp.dtype) -> jax.Array:
  """Returns values [B, S, K, H] of what `hold` made, in `dtype`."""
  if isinstance(held, jax.Array):
    return held
  assert spec.activation is not None
  return unpack_values(held, spec.activation, H).astype(dtype)


def empty(shape: tuple[int, int, int, int], spec: QuantSpec, dtype: str | jnp.dtype) -> Held:
  """Returns zeros as `hold` would return for values of this shape and dtype."""
  like = jax.eval_shape(lambda x_BSKH: hold(x_BSKH, spec), jax.ShapeDtypeStruct(shape, dtype))
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
