"""Counts the tiles that gradient filtering keeps, to judge thresholds and vocabulary order."""

# N tokens, D model, V vocabulary; R rows and W entries of a tile
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms, xla
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options, RowFactors, TileSize


class Aux(NamedTuple):
  """Holds the fractions of tiles of logits whose product the backward pass does, float32 scalars.

  1 without a threshold.
  """

  kept_e: jax.Array
  kept_c: jax.Array


def kept_tiles(inputs: Inputs, factors: RowFactors, size: TileSize, options: Options) -> Aux:
  """Computes the logits once more (2NVD FLOPs), in tiles of the backward pass's size."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  order_V = terms.vocabulary_order(inputs, factors.active_N, options)
  tiles_of_V = -(-V // size.entries)

  def filter_tile(index: jax.Array) -> Aux:
    start, new_R = xla.locate_run(index // tiles_of_V, size.rows, N)
    factors_R = terms.deactivate_rows(xla.slice_rows(factors, start, size.rows), ~new_R)
    chunk = xla.slice_chunk(inputs, start, size.rows)
    e_RD = jnp.where(factors_R.active_N[:, None], chunk.embeddings_ND, 0.0)
    chunk = chunk._replace(embeddings_ND=e_RD)
    tile = xla.slice_tile(chunk, order_V, index % tiles_of_V, size.entries, options)
    x = xla.tile_logits(chunk, tile, options)
    gradient, spread = xla.tile_gradient(x, tile, chunk, factors_R, options)
    kept_e = terms.passes_filter(gradient, spread, options.threshold_e)
    kept_c = terms.passes_filter(gradient, spread, options.threshold_c)
    return Aux(jnp.asarray(kept_e, jnp.float32), jnp.asarray(kept_c, jnp.float32))

  kept_by_tile = jax.lax.map(filter_tile, jnp.arange(-(-N // size.rows) * tiles_of_V))
  return jax.tree.map(jnp.mean, kept_by_tile)
