"""Computes linear cross-entropy in plain JAX by tiles of logits instead of all N x V.

`loss_sum` serves a scalar loss with 6NVD FLOPs: each token's weight is known in the forward pass,
so a chunk of rows keeps its logits just long enough to make its part of the gradients. `statistics`
and `gradients` are the two halves that every backend has; the second computes the logits again,
8NVD FLOPs together.

A tile x of logits is [W, R] for a classifier [V, D] and [R, W] for [D, V]: the orientation in which
all three products run fast on a CPU.
"""

# N tokens, D model, V vocabulary; R rows of a chunk, W entries of a tile
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import (
  Gradients,
  Inputs,
  Options,
  RowFactors,
  Statistics,
  TileSize,
)

SMALL_VOCABULARY = 4096
"""Up to this many entries rows of logits are short: chunks of them fit where one tile would."""


def two_pass_tile(N: int, V: int) -> TileSize:
  """Returns tiles of at most 2 MiB of float32 logits, large enough for products at full speed."""
  return TileSize(min(N, 512), min(V, 1024))


def one_pass_tile(N: int, V: int) -> TileSize:
  """Returns the tile where a chunk keeps its logits: 128 to 512 rows, or as many as 32 MiB hold."""
  if V <= SMALL_VOCABULARY:
    return TileSize(min(N, 2**23 // V), V)
  return TileSize(min(N, max(128, min(N // 8, 512))), 2048)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def loss_sum(inputs: Inputs, weight_N: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
  """Returns (`terms.total_loss`, lse [N]); to differentiate the first costs no second pass."""
  stats = terms.combine_shards(statistics(inputs, options), options)
  return terms.total_loss(stats, weight_N, options), stats.lse_N


def _loss_sum_forward(inputs: Inputs, weight_N: Any, options: Options) -> tuple[Any, Any]:
  inputs, weight_N = jax.tree.map(lambda argument: argument.value, (inputs, weight_N))
  scale = terms.float16_scale(inputs.embeddings_ND.dtype, weight_N)
  stats, sums = loss_gradients(inputs, weight_N / scale, options)
  loss = terms.total_loss(stats, weight_N, options)
  return (loss, stats.lse_N), (inputs, weight_N, scale, stats, sums)


def _loss_sum_backward(options: Options, saved: Any, cotangents: tuple[Any, Any]) -> Any:
  inputs, weight_N, scale, stats, sums = saved
  ct_loss, ct_lse_N = cotangents
  if isinstance(ct_lse_N, SymbolicZero):
    return terms.input_cotangents(sums, ct_loss * scale, inputs), None
  # Cotangents of the log-sum-exp are known only now, and the logits are computed again.
  if isinstance(ct_loss, SymbolicZero):
    ct_loss = jnp.zeros((), ct_lse_N.dtype)
  _, pull_back = jax.vjp(
    lambda stats: (terms.total_loss(stats, weight_N, options), stats.lse_N), stats
  )
  (ct_stats,) = pull_back((ct_loss, ct_lse_N))
  return terms.pull_back_statistics(gradients, inputs, stats, ct_stats, options), None


loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)


def loss_gradients(
  inputs: Inputs, weight_N: jax.Array, options: Options
) -> tuple[Statistics, Gradients]:
  """Returns row statistics and the gradients of `terms.total_loss`; logits are computed once."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  rows, width = one_pass_tile(N, V)
  order_V = terms.vocabulary_order(inputs, weight_N != 0, options)
  dtype = terms.accumulator(inputs.embeddings_ND.dtype)

  def add_chunk(carry: tuple[Statistics, Gradients], index: jax.Array) -> tuple[Any, None]:
    stats, sums = carry
    start, new_R = locate_run(index, rows, N)
    chunk, weight_R = slice_chunk(inputs, start, rows), slice_rows(weight_N, start, rows)
    all_entries = slice_tile(chunk, None, 0, V, options)
    x = tile_logits(chunk, all_entries, options)
    running = add_tile_statistics(no_statistics(chunk), x, all_entries, chunk, options)
    chunk_stats = terms.combine_shards(running.finish(), options)
    cotangents = jax.grad(terms.total_loss)(chunk_stats, weight_R * new_R, options)
    factors = terms.row_factors(chunk_stats, cotangents)
    sums = add_chunk_gradients(sums, chunk, factors, start, order_V, width, x, options)
    return (write_rows(stats, chunk_stats, start), sums), None

  # Every shard of the vocabulary has the same statistics: they vary like the weights alone.
  no_stats = Statistics(*(zeros_varying_like((N,), dtype, weight_N) for _ in range(3)))
  nothing = (no_stats, no_gradients(inputs, weight_N))
  return scan(add_chunk, nothing, jnp.arange(-(-N // rows)))[0]


def statistics(inputs: Inputs, options: Options) -> Statistics:
  """Returns row statistics; of this shard's entries where the vocabulary is split."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  rows, width = two_pass_tile(N, V)

  def add_chunk(stats: Statistics, index: jax.Array) -> tuple[Statistics, None]:
    start, _ = locate_run(index, rows, N)
    chunk = slice_chunk(inputs, start, rows)

    def add_tile(running: Running, index: jax.Array) -> tuple[Running, None]:
      tile = slice_tile(chunk, None, index, width, options)
      x = tile_logits(chunk, tile, options)
      return add_tile_statistics(running, x, tile, chunk, options), None

    running, _ = scan(add_tile, no_statistics(chunk), jnp.arange(-(-V // width)))
    return write_rows(stats, running.finish(), start), None

  dtype = terms.accumulator(inputs.embeddings_ND.dtype)
  no_stats = Statistics(*(zeros_varying_like((N,), dtype, inputs) for _ in range(3)))
  return scan(add_chunk, no_stats, jnp.arange(-(-N // rows)))[0]


def gradients(inputs: Inputs, factors: RowFactors, options: Options) -> Gradients:
  """Returns the gradients in the accumulator's dtype; computes the logits again, tile by tile."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  rows, width = two_pass_tile(N, V)
  order_V = terms.vocabulary_order(inputs, factors.active_N, options)

  def add_chunk(sums: Gradients, index: jax.Array) -> tuple[Gradients, None]:
    start, new_R = locate_run(index, rows, N)
    chunk = slice_chunk(inputs, start, rows)
    factors_R = terms.deactivate_rows(slice_rows(factors, start, rows), ~new_R)
    return add_chunk_gradients(sums, chunk, factors_R, start, order_V, width, None, options), None

  return scan(add_chunk, no_gradients(inputs, factors), jnp.arange(-(-N // rows)))[0]


def backward_tile(inputs: Inputs, options: Options) -> TileSize:
  """Returns the tile that filters decide about in `gradients`."""
  return two_pass_tile(inputs.labels_N.size, options.entries(inputs))


# ------------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
  """Holds W entries of the vocabulary; where W does not divide V, the last tile starts early."""

  classifier: jax.Array
  bias_W: jax.Array | None
  ids_W: jax.Array
  new_W: jax.Array | None  # entries that no earlier tile held; None: all
  start: jax.Array


class Running(NamedTuple):
  """Holds statistics of the entries so far of each row of a chunk."""

  top_R: jax.Array
  mass_R: jax.Array
  target_R: jax.Array
  total_R: jax.Array

  def finish(self) -> Statistics:
    """Returns the statistics once all entries are in."""
    return Statistics(terms.log_sum_exp(self.top_R, self.mass_R), self.target_R, self.total_R)


def locate_run(index: jax.Array | int, size: int, length: int) -> tuple[jax.Array, jax.Array]:
  """Returns the start of the index-th run of `size`, moved back to fit, and its new places."""
  start = jnp.minimum(index * size, length - size)
  return start, start + jnp.arange(size) >= index * size


def slice_rows(tree: Any, start: jax.Array, rows: int) -> Any:
  """Returns a run of rows of every array."""
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, rows), tree)


def write_rows(tree: Any, run: Any, start: jax.Array) -> Any:
  """Returns the arrays with a run of their rows replaced."""
  return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), tree, run)


def slice_chunk(inputs: Inputs, start: jax.Array, rows: int) -> Inputs:
  """Returns the inputs with a run of the tokens and all of the vocabulary."""
  e_RD, labels_R = slice_rows((inputs.embeddings_ND, inputs.labels_N), start, rows)
  return inputs._replace(embeddings_ND=e_RD, labels_N=labels_R)


def slice_tile(
  inputs: Inputs, order_V: jax.Array | None, index: jax.Array | int, width: int, options: Options
) -> Tile:
  """Returns the index-th tile of the vocabulary, in the given order or its own."""
  axis, V = options.vocabulary_axis, options.entries(inputs)
  start, new_W = locate_run(index, width, V)
  if order_V is None:
    ids_W = start + jnp.arange(width, dtype=jnp.int32)
    classifier = jax.lax.dynamic_slice_in_dim(inputs.classifier, start, width, axis)
  else:
    ids_W = jax.lax.dynamic_slice_in_dim(order_V, start, width)
    classifier = jnp.take(inputs.classifier, ids_W, axis=axis)
  bias_W = None if inputs.bias_V is None else inputs.bias_V[ids_W]
  return Tile(classifier, bias_W, ids_W, new_W if V % width else None, start)


def along_rows(value_R: jax.Array, options: Options) -> jax.Array:
  """Shapes a number of each row so that it broadcasts against a tile x."""
  return jnp.expand_dims(value_R, options.vocabulary_axis)


def along_entries(value_W: jax.Array, options: Options) -> jax.Array:
  """Shapes a number of each entry so that it broadcasts against a tile x."""
  return jnp.expand_dims(value_W, 1 - options.vocabulary_axis)


def fill_seen(x: jax.Array, tile: Tile, value: float, options: Options) -> jax.Array:
  """Returns x with `value` in place of entries that an earlier tile already held."""
  if tile.new_W is None:
    return x
  return jnp.where(along_entries(tile.new_W, options), x, value)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Contracts with sums in float32 at least, and all digits of float32 inputs."""
  dtype = terms.accumulator(a.dtype)
  return jnp.einsum(spec, a, b, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST)


def tile_logits(chunk: Inputs, tile: Tile, options: Options) -> jax.Array:
  """Returns the logits of a chunk's rows at a tile's entries."""
  if options.layout == "vd":
    x = product("vd,rd->vr", tile.classifier, chunk.embeddings_ND)
  else:
    x = product("rd,dv->rv", chunk.embeddings_ND, tile.classifier)
  bias = None if tile.bias_W is None else along_entries(tile.bias_W, options)
  return terms.logits(x, bias, options)


def no_statistics(chunk: Inputs) -> Running:
  """Returns the running statistics before the first tile."""
  dtype = terms.accumulator(chunk.embeddings_ND.dtype)
  zero_R = zeros_varying_like(chunk.labels_N.shape, dtype, chunk)
  return Running(zero_R - jnp.inf, zero_R, zero_R, zero_R)


def add_tile_statistics(
  running: Running, x: jax.Array, tile: Tile, chunk: Inputs, options: Options
) -> Running:
  """Adds the logits of a tile, whose entries stand in their own order, to running statistics."""
  axis = options.vocabulary_axis
  x_or_minus_inf = fill_seen(x, tile, -jnp.inf, options)
  top_R, mass_R = terms.add_exponentials(running.top_R, running.mass_R, x_or_minus_inf, axis)
  W = x.shape[axis]
  place_R = chunk.labels_N - tile.start
  here_R = (place_R >= 0) & (place_R < W)
  place_R = jnp.clip(place_R, 0, W - 1)
  if tile.new_W is not None:
    here_R = here_R & tile.new_W[place_R]
  at_label_R = jnp.take_along_axis(x, along_rows(place_R, options), axis).squeeze(axis)
  target_R = running.target_R + jnp.where(here_R, at_label_R, 0.0)
  total_R = running.total_R
  if options.needs_total:
    total_R = total_R + jnp.sum(fill_seen(x, tile, 0.0, options), axis)
  return Running(top_R, mass_R, target_R, total_R)


def tile_gradient(
  x: jax.Array, tile: Tile, chunk: Inputs, factors: RowFactors, options: Options
) -> tuple[jax.Array, RowFactors]:
  """Returns d loss / d x of a tile, and the rows' factors shaped to broadcast against it."""
  spread = RowFactors(*(along_rows(value_R, options) for value_R in factors))
  hit = along_entries(tile.ids_W, options) == along_rows(chunk.labels_N, options)
  gradient = terms.logit_gradient(x, hit, spread, options)
  return fill_seen(gradient, tile, 0.0, options), spread


def no_gradients(inputs: Inputs, *like: Any) -> Gradients:
  """Returns zeros that vary over the mesh axes of the inputs and of `like`."""
  embeddings_ND, classifier, _, bias_V = inputs
  dtype = terms.accumulator(embeddings_ND.dtype)

  def zeros(array: jax.Array | None) -> Any:
    return None if array is None else zeros_varying_like(array.shape, dtype, inputs, like)

  return Gradients(zeros(embeddings_ND), zeros(classifier), zeros(bias_V))


def add_chunk_gradients(
  sums: Gradients,
  chunk: Inputs,
  factors: RowFactors,
  start: jax.Array,
  order_V: jax.Array | None,
  width: int,
  x_of_all: jax.Array | None,
  options: Options,
) -> Gradients:
  """Adds the gradients of the chunk whose rows begin at `start`.

  `x_of_all` are the chunk's logits of all entries in their own order; None: they are made again.
  """
  # Inactive rows may hold NaN, and 0 * NaN would reach every row of the classifier's gradient.
  e_RD = jnp.where(factors.active_N[:, None], chunk.embeddings_ND, 0.0)
  chunk = chunk._replace(embeddings_ND=e_RD)

  def add_tile(carry: Gradients, index: jax.Array) -> tuple[Gradients, None]:
    tile = slice_tile(chunk, order_V, index, width, options)
    if x_of_all is None:
      x = tile_logits(chunk, tile, options)
    else:
      active = along_rows(factors.active_N, options)
      x = jnp.where(active, slice_entries(x_of_all, tile, order_V, options), 0.0)
    gradient, spread = tile_gradient(x, tile, chunk, factors, options)
    g = gradient * terms.logit_slope(x, options)
    rounded_g = g.astype(e_RD.dtype)
    de_RD, dc, db_V = carry

    def add_to_embeddings(de_RD: jax.Array) -> jax.Array:
      spec = "vr,vd->rd" if options.layout == "vd" else "rv,dv->rd"
      return de_RD + product(spec, rounded_g, tile.classifier)

    def add_to_weights(weights: tuple[jax.Array, jax.Array | None]) -> Any:
      dc, db_V = weights
      if options.layout == "vd":
        dc = add_entries(dc, product("vr,rd->vd", rounded_g, e_RD), tile, order_V, options)
      else:
        dc = add_entries(dc, product("rd,rv->dv", e_RD, rounded_g), tile, order_V, options)
      db_W = jnp.sum(g, 1 - options.vocabulary_axis)
      return dc, None if db_V is None else db_V.at[tile.ids_W].add(db_W)

    keep_e = terms.passes_filter(gradient, spread, options.threshold_e)
    keep_c = terms.passes_filter(gradient, spread, options.threshold_c)
    de_RD = update_if(keep_e, add_to_embeddings, de_RD)
    dc, db_V = update_if(keep_c, add_to_weights, (dc, db_V))
    return Gradients(de_RD, dc, db_V), None

  no_rows_RD = zeros_varying_like(e_RD.shape, sums.embeddings_ND.dtype, sums, factors)
  carry = sums._replace(embeddings_ND=no_rows_RD)
  added, _ = scan(add_tile, carry, jnp.arange(-(-options.entries(chunk) // width)))
  old_RD = jax.lax.dynamic_slice_in_dim(sums.embeddings_ND, start, e_RD.shape[0])
  de_ND = write_rows(sums.embeddings_ND, old_RD + added.embeddings_ND, start)
  return added._replace(embeddings_ND=de_ND)


def slice_entries(
  x: jax.Array, tile: Tile, order_V: jax.Array | None, options: Options
) -> jax.Array:
  """Returns a tile's part of the logits of all entries."""
  axis = options.vocabulary_axis
  if order_V is not None:
    return jnp.take(x, tile.ids_W, axis)
  return jax.lax.dynamic_slice_in_dim(x, tile.start, tile.ids_W.size, axis)


def add_entries(
  total: jax.Array, part: jax.Array, tile: Tile, order_V: jax.Array | None, options: Options
) -> jax.Array:
  """Adds the gradient of a tile of the classifier to that of the whole."""
  axis = options.vocabulary_axis
  if order_V is not None:
    return (total.at[tile.ids_W] if axis == 0 else total.at[:, tile.ids_W]).add(part)
  old = jax.lax.dynamic_slice_in_dim(total, tile.start, tile.ids_W.size, axis)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, tile.start, axis)


def update_if(condition: jax.Array | bool, update: Callable[[Any], Any], value: Any) -> Any:
  """Returns `update(value)` where the condition holds; without a branch where it is known to."""
  return update(value) if condition is True else jax.lax.cond(condition, update, lambda v: v, value)


def scan(body: Callable[[Any, Any], Any], start: Any, xs: Any) -> Any:
  """Scans as `jax.lax.scan` does, but runs a single step without a loop."""
  if len(xs) > 1:
    return jax.lax.scan(body, start, xs)
  return body(start, xs[0])
