"""How many tiles gradient filtering keeps: a diagnosis of the thresholds and of the order of the vocabulary."""

# N tokens, D model, V vocabulary
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms, tiling
from pallas_kernels.linear_cross_entropy.blocks import Blocks
from pallas_kernels.linear_cross_entropy.terms import Options, Rows


class Aux(NamedTuple):
  """Fractions of the tiles of logits whose product the backward pass does: float32 scalars, 1 without a threshold."""

  kept_e: jax.Array
  kept_c: jax.Array


def kept_tiles(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  rows: Rows,
  size: Blocks,
  options: Options,
) -> Aux:
  """Computes the logits once more (2NVD FLOPs), in the tiles that the backward pass in question uses."""
  counted_N = rows.active_N
  order_V = (
    terms.sorted_order(embeddings_ND, classifier, bias_V, counted_N, options)
    if options.sort
    else None
  )
  weights = tiling.Weights(classifier, bias_V, order_V, options)

  def one_tile(row_tile: jax.Array, vocabulary_tile: jax.Array) -> Aux:
    start, fresh_R = tiling.window(row_tile, size.rows, labels_N.size)
    e_RD, labels_R, part = tiling.take((embeddings_ND, labels_N, rows), start, size.rows)
    tile, chosen = tiling.cut(weights, vocabulary_tile, size.entries), tiling.only(part, fresh_R)
    x = tiling.tile_logits(jnp.where(chosen.active_N[:, None], e_RD, 0.0), tile, options)
    bracket, spread = tiling.tile_bracket(x, tile, labels_R, chosen, options)
    kept = (
      terms.keeps(bracket, spread, limit) for limit in (options.threshold_e, options.threshold_c)
    )
    return Aux(*(jnp.asarray(flag, jnp.float32) for flag in kept))

  row_tiles, vocabulary_tiles = -(-labels_N.size // size.rows), -(-weights.entries // size.entries)
  tiles = jnp.arange(row_tiles * vocabulary_tiles)
  kept = jax.lax.map(
    lambda index: one_tile(index // vocabulary_tiles, index % vocabulary_tiles), tiles
  )
  return jax.tree.map(jnp.mean, kept)
