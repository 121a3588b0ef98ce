"""Tiles of the logits in plain JAX: memory for one tile instead of N x V, on any backend.

`statistics` and `gradients` are the two halves that every backend has; the second computes the logits again (8NVD
FLOPs together). `loss_gradients` serves a scalar loss with 6NVD: each token's weight is known in the forward pass, so a
chunk of rows keeps its logits just long enough to make its part of the gradients.
"""

# N tokens, D model, V vocabulary; R rows of a chunk; X logits of a tile, oriented as `tiling` says
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import blocks, terms
from pallas_kernels.linear_cross_entropy.terms import Options, Rows, Statistics
from pallas_kernels.linear_cross_entropy.tiling import (
  Gradients,
  Tile,
  Weights,
  add_rows,
  add_tile,
  by_row,
  classifier_gradient,
  cut,
  entries_of,
  fresh,
  no_gradients,
  only,
  rows_gradient,
  take,
  tile_bracket,
  tile_logits,
  window,
)


def loop(body: Callable[[Any, Any], Any], start: Any, xs: Any) -> Any:
  """`jax.lax.scan`, but for a single step, which needs no loop and no slices: few rows, or one tile of all entries."""
  if len(jax.tree.leaves(xs)[0]) > 1:
    return jax.lax.scan(body, start, xs)
  carry, y = body(start, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda x: x[None], y)


def tile_statistics(
  running: tuple[jax.Array, ...], x: jax.Array, tile: Tile, labels_R: jax.Array, options: Options
) -> tuple[jax.Array, ...]:
  """Adds a tile, of entries in their own order, to the running (largest logit, exponentials, target logit, total)."""
  top_R, mass_R, target_R, total_R = running
  axis = options.vocabulary_axis
  top_R, mass_R = terms.add_exponentials(top_R, mass_R, fresh(tile, x, -jnp.inf, options), axis)
  W = x.shape[axis]
  place_R = labels_R - tile.start
  here_R = (place_R >= 0) & (place_R < W)
  place_R = jnp.clip(place_R, 0, W - 1)
  if tile.fresh_W is not None:
    here_R = here_R & tile.fresh_W[place_R]
  at_label_R = jnp.take_along_axis(x, by_row(place_R, options), axis).squeeze(axis)
  target_R = target_R + jnp.where(here_R, at_label_R, 0.0)
  if options.total:
    total_R = total_R + jnp.sum(fresh(tile, x, 0.0, options), axis)
  return top_R, mass_R, target_R, total_R


def chunk_statistics(
  e_RD: jax.Array, labels_R: jax.Array, weights: Weights, width: int
) -> tuple[Statistics, jax.Array]:
  """Statistics of a chunk of rows, and its logits, tile by tile: stored only where they are used."""
  dtype = terms.accumulator(e_RD.dtype)
  start = [terms.zeros(labels_R.shape, dtype, e_RD, labels_R, weights[:3]) for _ in range(4)]

  def body(
    running: tuple[jax.Array, ...], index: jax.Array
  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    tile = cut(weights, index, width)
    x = tile_logits(e_RD, tile, weights.options)
    return tile_statistics(running, x, tile, labels_R, weights.options), x

  tiles = jnp.arange(-(-weights.entries // width))
  (top_R, mass_R, target_R, total_R), kept = loop(body, (start[0] - jnp.inf, *start[1:]), tiles)
  return Statistics(terms.finish_exponentials(top_R, mass_R), target_R, total_R), kept


def chunk_gradients(
  sums: Gradients,
  e_RD: jax.Array,
  labels_R: jax.Array,
  rows: Rows,
  weights: Weights,
  width: int,
  kept: jax.Array | None,
) -> tuple[Gradients, jax.Array]:
  """Adds a chunk's part to the classifier's gradients; also returns the gradient of its rows of E.

  `kept` are the logits of all entries in their own order, if they are known.
  """
  options, dtype = weights.options, terms.accumulator(e_RD.dtype)
  # Inactive rows may hold NaN, and 0 * NaN would reach every row of the classifier's gradient.
  e_RD = jnp.where(rows.active_N[:, None], e_RD, 0.0)

  def body(
    carry: tuple[Gradients, jax.Array], index: jax.Array
  ) -> tuple[tuple[Gradients, jax.Array], None]:
    sums, de_RD = carry
    tile = cut(weights, index, width)
    if kept is None:
      x = tile_logits(e_RD, tile, options)
    else:
      x = jnp.where(by_row(rows.active_N, options), entries_of(kept, tile, weights), 0.0)
    bracket, spread = tile_bracket(x, tile, labels_R, rows, options)
    g = bracket * terms.slope(x, options)
    small = g.astype(e_RD.dtype)
    de_RD = when(
      terms.keeps(bracket, spread, options.threshold_e),
      lambda de_RD: de_RD + rows_gradient(small, tile, options),
      de_RD,
    )
    sums = when(
      terms.keeps(bracket, spread, options.threshold_c),
      lambda sums: add_tile(
        sums,
        classifier_gradient(small, e_RD, options),
        jnp.sum(g, 1 - options.vocabulary_axis),
        tile,
        weights,
      ),
      sums,
    )
    return (sums, de_RD), None

  tiles = jnp.arange(-(-weights.entries // width))
  start = terms.zeros(e_RD.shape, dtype, e_RD, sums, rows)
  (sums, de_RD), _ = loop(body, (sums, start), tiles)
  return sums, de_RD


def when(condition: jax.Array | bool, update: Callable[[Any], Any], value: Any) -> Any:
  """`update(value)` where the condition holds; without a branch where it is known to."""
  return update(value) if condition is True else jax.lax.cond(condition, update, lambda v: v, value)


def statistics(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
) -> Statistics:
  """Row statistics from tiles of at most 2 MiB; of this shard's entries where the vocabulary is split."""
  weights = Weights(classifier, bias_V, None, options)
  N, dtype = labels_N.size, terms.accumulator(embeddings_ND.dtype)
  size, width = blocks.xla_tiles(N, weights.entries)

  def body(done: Statistics, index: jax.Array) -> tuple[Statistics, None]:
    start, _ = window(index, size, N)
    e_RD, labels_R = take((embeddings_ND, labels_N), start, size)
    chunk, _ = chunk_statistics(e_RD, labels_R, weights, width)
    return jax.tree.map(
      lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), done, chunk
    ), None

  start = Statistics(
    *(terms.zeros((N,), dtype, embeddings_ND, labels_N, weights[:3]) for _ in range(3))
  )
  return loop(body, start, jnp.arange(-(-N // size)))[0]


def backward_tile(
  embeddings_ND: jax.Array, classifier: jax.Array, options: Options
) -> blocks.Blocks:
  """The tile that filters decide about in `gradients`."""
  return blocks.xla_tiles(embeddings_ND.shape[0], classifier.shape[options.vocabulary_axis])


def gradients(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  rows: Rows,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Gradients of E, C and b in the accumulator's dtype; the logits are computed again, tile by tile."""
  counted_N = rows.active_N
  order_V = (
    terms.sorted_order(embeddings_ND, classifier, bias_V, counted_N, options)
    if options.sort
    else None
  )
  weights = Weights(classifier, bias_V, order_V, options)
  N, dtype = labels_N.size, terms.accumulator(embeddings_ND.dtype)
  size, width = blocks.xla_tiles(N, weights.entries)

  def body(
    carry: tuple[Gradients, jax.Array], index: jax.Array
  ) -> tuple[tuple[Gradients, jax.Array], None]:
    sums, de_ND = carry
    start, fresh_R = window(index, size, N)
    e_RD, labels_R, part = take((embeddings_ND, labels_N, rows), start, size)
    sums, de_RD = chunk_gradients(sums, e_RD, labels_R, only(part, fresh_R), weights, width, None)
    return (sums, add_rows(de_ND, de_RD, start)), None

  like = (embeddings_ND, labels_N, rows)
  carry = (
    no_gradients(weights, dtype, *like),
    terms.zeros(embeddings_ND.shape, dtype, *like, weights[:3]),
  )
  (sums, de_ND), _ = loop(body, carry, jnp.arange(-(-N // size)))
  return de_ND, sums.classifier, sums.bias_V


def loss_gradients(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  weight_N: jax.Array,
  options: Options,
) -> tuple[Statistics, tuple[jax.Array, jax.Array, jax.Array | None]]:
  """Row statistics, and the gradients of `terms.total_loss`; the logits are computed once.

  A chunk of R rows keeps its R x V logits meanwhile (`blocks.xla_chunk`).
  """
  counted_N = weight_N != 0
  order_V = (
    terms.sorted_order(embeddings_ND, classifier, bias_V, counted_N, options)
    if options.sort
    else None
  )
  weights = Weights(classifier, bias_V, order_V, options)
  N, dtype = labels_N.size, terms.accumulator(embeddings_ND.dtype)
  in_order = weights._replace(order_V=None)
  size, width = blocks.xla_chunk(N, weights.entries)

  def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
    done, sums, de_ND = carry
    start, fresh_R = window(index, size, N)
    e_RD, labels_R, weight_R = take((embeddings_ND, labels_N, weight_N), start, size)
    local, (kept,) = chunk_statistics(e_RD, labels_R, in_order, weights.entries)
    stats = terms.combine(local, options.axis_name)
    cotangents = jax.grad(terms.total_loss)(stats, weight_R * fresh_R, options)
    rows = terms.backward_rows(stats, cotangents)
    sums, de_RD = chunk_gradients(sums, e_RD, labels_R, rows, weights, width, kept)
    done = jax.tree.map(
      lambda all_N, a_R: jax.lax.dynamic_update_slice_in_dim(all_N, a_R, start, 0), done, stats
    )
    return (done, sums, add_rows(de_ND, de_RD, start)), None

  like = (embeddings_ND, labels_N, weight_N, weights[:3])
  # Every shard of the vocabulary has the same statistics: they vary like the weights, not like the classifier.
  start = (
    Statistics(*(terms.zeros((N,), dtype, weight_N) for _ in range(3))),
    no_gradients(weights, dtype, *like),
    terms.zeros(embeddings_ND.shape, dtype, *like),
  )
  (stats, sums, de_ND), _ = loop(body, start, jnp.arange(-(-N // size)))
  return stats, (de_ND, sums.classifier, sums.bias_V)
