"""Tiles of the logits in plain JAX: how they are cut, what is computed of one, and where its gradients go."""

# N tokens, D model, V vocabulary; R rows of a chunk, W entries of a tile; a tile X of logits is [W, R] for a classifier
# [V, D] and [R, W] for [D, V]: the orientation in which all three products run fast on a CPU
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import terms
from pallas_kernels.linear_cross_entropy.terms import Options, Rows


class Weights(NamedTuple):
  """The classifier with its bias, and the order in which the backward pass visits the vocabulary."""

  classifier: jax.Array
  bias_V: jax.Array | None
  order_V: jax.Array | None
  options: Options

  @property
  def entries(self) -> int:
    return self.classifier.shape[self.options.vocabulary_axis]


class Tile(NamedTuple):
  """W entries of the vocabulary. Where W does not divide it, the last tile starts early to be whole."""

  classifier: jax.Array
  bias_W: jax.Array | None
  ids_W: jax.Array
  fresh_W: jax.Array | None
  """what no tile has had yet; None: everything"""
  start: jax.Array


class Gradients(NamedTuple):
  """Sums of the gradients over the chunks so far; bias_V is None without a bias."""

  classifier: jax.Array
  bias_V: jax.Array | None


def window(index: jax.Array, size: int, length: int) -> tuple[jax.Array, jax.Array]:
  """Start of the index-th run of `size` among `length`, moved back to fit, and which of its places are new."""
  start = jnp.minimum(index * size, length - size)
  return start, start + jnp.arange(size) >= index * size


def take(tree: Any, start: jax.Array, size: int) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), tree)


def cut(weights: Weights, index: jax.Array, size: int) -> Tile:
  axis = weights.options.vocabulary_axis
  start, fresh_W = window(index, size, weights.entries)
  if weights.order_V is None:
    ids_W = start + jnp.arange(size, dtype=jnp.int32)
    classifier = jax.lax.dynamic_slice_in_dim(weights.classifier, start, size, axis)
  else:
    ids_W = jax.lax.dynamic_slice_in_dim(weights.order_V, start, size)
    classifier = jnp.take(weights.classifier, ids_W, axis=axis)
  bias_W = None if weights.bias_V is None else weights.bias_V[ids_W]
  return Tile(classifier, bias_W, ids_W, fresh_W if weights.entries % size else None, start)


def by_row(value_R: jax.Array, options: Options) -> jax.Array:
  """A number of each row of E, to broadcast against a tile X."""
  return jnp.expand_dims(value_R, options.vocabulary_axis)


def by_entry(value_W: jax.Array, options: Options) -> jax.Array:
  """A number of each entry of the vocabulary, to broadcast against a tile X."""
  return jnp.expand_dims(value_W, 1 - options.vocabulary_axis)


def fresh(tile: Tile, x: jax.Array, otherwise: float, options: Options) -> jax.Array:
  """The tile's values where no tile before had the entry."""
  return x if tile.fresh_W is None else jnp.where(by_entry(tile.fresh_W, options), x, otherwise)


def entries_of(x: jax.Array, tile: Tile, weights: Weights) -> jax.Array:
  """A tile of X from the X of all entries."""
  axis = weights.options.vocabulary_axis
  if weights.order_V is not None:
    return jnp.take(x, tile.ids_W, axis)
  return jax.lax.dynamic_slice_in_dim(x, tile.start, tile.ids_W.size, axis)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum that accumulates in float32 at least, with all digits of float32 inputs."""
  dtype = terms.accumulator(a.dtype)
  return jnp.einsum(spec, a, b, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST)


def tile_logits(e_RD: jax.Array, tile: Tile, options: Options) -> jax.Array:
  """X of one tile."""
  if options.layout == "vd":
    x = product("vd,rd->vr", tile.classifier, e_RD)
  else:
    x = product("rd,dv->rv", e_RD, tile.classifier)
  return terms.logits(x, None if tile.bias_W is None else by_entry(tile.bias_W, options), options)


def tile_bracket(
  x: jax.Array, tile: Tile, labels_R: jax.Array, rows: Rows, options: Options
) -> tuple[jax.Array, Rows]:
  """d loss / d X of one tile, and the rows' factors spread to broadcast against it."""
  spread = Rows(*(by_row(value_R, options) for value_R in rows))
  hit = by_entry(tile.ids_W, options) == by_row(labels_R, options)
  return fresh(tile, terms.logit_gradient(x, hit, spread, options), 0.0, options), spread


def rows_gradient(g: jax.Array, tile: Tile, options: Options) -> jax.Array:
  """A tile's part of the gradient of E [R, D], from that of X."""
  return product("vr,vd->rd" if options.layout == "vd" else "rv,dv->rd", g, tile.classifier)


def classifier_gradient(g: jax.Array, e_RD: jax.Array, options: Options) -> jax.Array:
  """A chunk's part of the gradient of a tile of the classifier, from that of X."""
  return product("vr,rd->vd", g, e_RD) if options.layout == "vd" else product("rd,rv->dv", e_RD, g)


def no_gradients(weights: Weights, dtype: jax.typing.DTypeLike, *like: Any) -> Gradients:
  bias_V = (
    None if weights.bias_V is None else terms.zeros((weights.entries,), dtype, weights[:3], like)
  )
  return Gradients(terms.zeros(weights.classifier.shape, dtype, weights[:3], like), bias_V)


def add_tile(
  sums: Gradients, dc: jax.Array, db_W: jax.Array, tile: Tile, weights: Weights
) -> Gradients:
  axis = weights.options.vocabulary_axis
  if weights.order_V is not None:
    at = sums.classifier.at[tile.ids_W] if axis == 0 else sums.classifier.at[:, tile.ids_W]
    classifier = at.add(dc)
  else:
    old = jax.lax.dynamic_slice_in_dim(sums.classifier, tile.start, tile.ids_W.size, axis)
    classifier = jax.lax.dynamic_update_slice_in_dim(sums.classifier, old + dc, tile.start, axis)
  return Gradients(
    classifier, None if sums.bias_V is None else sums.bias_V.at[tile.ids_W].add(db_W)
  )


def only(rows: Rows, chosen_R: jax.Array) -> Rows:
  """Rows of which only the chosen are active."""
  active_R = rows.active_N & chosen_R
  return Rows(
    lse_N=jnp.where(active_R, rows.lse_N, jnp.inf),
    scale_N=jnp.where(active_R, rows.scale_N, 0.0),
    at_target_N=jnp.where(active_R, rows.at_target_N, 0.0),
    offset_N=jnp.where(active_R, rows.offset_N, 0.0),
    unit_N=rows.unit_N,
    active_N=active_R,
  )


def add_rows(de_ND: jax.Array, de_RD: jax.Array, start: jax.Array) -> jax.Array:
  old_RD = jax.lax.dynamic_slice_in_dim(de_ND, start, de_RD.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(de_ND, old_RD + de_RD, start, 0)
