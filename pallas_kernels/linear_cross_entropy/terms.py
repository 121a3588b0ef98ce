"""The mathematics that every implementation of the linear cross-entropy shares.

    u = (E C^T + b) / temperature      x = softcap * tanh(u / softcap), or u      lse_i = log sum_v exp(x_iv)

The loss of a token needs only three numbers of its row of logits: lse, the logit of its target, and the total of the
row (for label smoothing). Implementations compute those (`Statistics`) and, given the cotangents of the three, the
gradients of E, C and b. Everything between the three numbers and the scalar loss is `row_loss`, differentiated by JAX.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, sections 3 and 4.
"""

# N tokens, D model, V vocabulary. Tiles may have the vocabulary first or last: functions here broadcast.
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What is fixed when the operation is traced."""

  vocabulary: int
  """V, all shards together"""
  softcap: float | None = None
  temperature: float = 1.0
  layout: str = "vd"
  """"vd": the classifier is [V, D]; "dv": it is [D, V]"""
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  threshold_e: float | None = None
  """skip a tile's product for the gradient of E where all of |softmax - onehot| is below this"""
  threshold_c: float | None = None
  """the same for the gradient of C"""
  sort: bool = False
  """visit the vocabulary by falling mean logit in the backward pass"""
  axis_name: str | tuple[str, ...] | None = None
  """mesh axis that the vocabulary is split over, inside shard_map"""
  interpret: bool = False
  """run Pallas kernels in the interpreter"""

  @property
  def total(self) -> bool:
    """Whether the loss needs the sum of every row's logits."""
    return self.label_smoothing > 0

  @property
  def vocabulary_axis(self) -> int:
    return self.layout.index("v")


class Statistics(NamedTuple):
  """What the loss needs of each row of logits; float32 (float64 for float64 inputs). Cotangents have the same form."""

  lse_N: jax.Array
  target_N: jax.Array  # 0 where the label names no entry of the vocabulary
  total_N: jax.Array  # 0 unless Options.total


class Rows(NamedTuple):
  """What the backward pass needs of each row: see `backward_rows`."""

  lse_N: jax.Array
  scale_N: jax.Array
  at_target_N: jax.Array
  offset_N: jax.Array
  unit_N: jax.Array
  active_N: jax.Array


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def logits(product: jax.Array, bias: jax.Array | None, options: Options) -> jax.Array:
  """x of a tile from its product E C^T; `bias` broadcasts against it."""
  u = product if bias is None else product + bias
  u = u if options.temperature == 1.0 else u * (1.0 / options.temperature)
  return u if options.softcap is None else options.softcap * jnp.tanh(u * (1.0 / options.softcap))


def slope(x: jax.Array, options: Options) -> jax.Array | float:
  """d logit / d product, from the logit."""
  if options.softcap is None:
    return 1.0 / options.temperature
  scaled = x * (1.0 / options.softcap)
  return (1.0 - scaled * scaled) * (1.0 / options.temperature)


def row_loss(stats: Statistics, options: Options) -> jax.Array:
  """Loss of each token in nats, from its statistics: lse - (1 - a) target - (a / V) total + z lse^2."""
  loss_N = stats.lse_N - (1.0 - options.label_smoothing) * stats.target_N
  if options.total:
    loss_N = loss_N - (options.label_smoothing / options.vocabulary) * stats.total_N
  return loss_N + options.z_loss * jnp.square(stats.lse_N) if options.z_loss else loss_N


def keep_counted(stats: Statistics, counted_N: jax.Array) -> Statistics:
  """Zeroes the rows that do not count, so that neither their values nor their gradients reach the loss, NaN included.

  A row whose logits are all -inf has no distribution: lse is -inf, and its loss and gradient are 0.
  """
  counted_N = counted_N & (stats.lse_N != -jnp.inf)
  return Statistics(*(jnp.where(counted_N, value_N, 0.0) for value_N in stats))


def total_loss(stats: Statistics, weight_N: jax.Array, options: Options) -> jax.Array:
  """Sum of the rows' losses times their weights; a row of weight 0 does not count."""
  return jnp.sum(weight_N * row_loss(keep_counted(stats, weight_N != 0), options))


def backward_rows(stats: Statistics, cotangents: Statistics) -> Rows:
  """Per-row factors of the logits' gradient: offset + where(target, at_target, scale * exp(x - lse)).

  At the target it is scale * (p - 1) + (scale + ct_target), with p - 1 from expm1: exp(...) - 1 has lost all its
  digits once p is near 1. Rows without any cotangent are inactive: their lse is +inf, so that they add nothing.
  """
  scale_N, target_N, offset_N = cotangents
  active_N = ((scale_N != 0) | (target_N != 0) | (offset_N != 0)) & (stats.lse_N != -jnp.inf)
  at_target_N = scale_N * jnp.expm1(stats.target_N - stats.lse_N) + (scale_N + target_N)
  unit_N = jnp.where(
    target_N != 0, jnp.abs(target_N), jnp.where(scale_N != 0, jnp.abs(scale_N), 1.0)
  )
  return Rows(
    lse_N=jnp.where(active_N, stats.lse_N, jnp.inf),
    scale_N=jnp.where(active_N, scale_N, 0.0),
    at_target_N=jnp.where(active_N, at_target_N, 0.0),
    offset_N=jnp.where(active_N, offset_N, 0.0),
    unit_N=unit_N,
    active_N=active_N,
  )


def logit_gradient(x: jax.Array, hit: jax.Array, rows: Rows, options: Options) -> jax.Array:
  """d loss / d logit of a tile; the entries of `rows` broadcast against it, `hit` marks the targets."""
  gradient = jnp.where(hit, rows.at_target_N, rows.scale_N * jnp.exp(x - rows.lse_N))
  return gradient + rows.offset_N if options.total else gradient


def keeps(gradient: jax.Array, rows: Rows, threshold: float | None) -> jax.Array | bool:
  """Whether a tile's product has to be done: some |softmax - onehot| reaches the threshold, or is NaN."""
  if threshold is None:
    return True
  return jnp.any(~(jnp.abs(gradient) < threshold * rows.unit_N))


def add_exponentials(
  top: jax.Array, mass: jax.Array, x: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  """Adds a tile to a running log-sum-exp: the largest logit so far and the sum of exp(x - anchor(largest))."""
  new_top = jnp.maximum(top, jnp.max(x, axis=axis, keepdims=top.ndim == x.ndim))
  shift = anchor(new_top)
  shift_x = shift if shift.ndim == x.ndim else jnp.expand_dims(shift, axis)
  added = jnp.sum(jnp.exp(x - shift_x), axis=axis, keepdims=top.ndim == x.ndim)
  return new_top, mass * jnp.exp(top - shift) + added


def finish_exponentials(top: jax.Array, mass: jax.Array) -> jax.Array:
  return anchor(top) + jnp.log(mass)


def anchor(top: jax.Array) -> jax.Array:
  """What exponents are taken relative to: `top` where it is finite (inf - inf would be NaN), else 0."""
  return jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: Any) -> jax.Array:
  """Zeros that vary over the same mesh axes as `like`, as a loop's carry must inside shard_map."""
  varying = set().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(like)))
  return (
    jax.lax.pcast(jnp.zeros(shape, dtype), tuple(varying), to="varying")
    if varying
    else jnp.zeros(shape, dtype)
  )


def combine(stats: Statistics, axis_name: str | tuple[str, ...] | None) -> Statistics:
  """Statistics of whole rows from those of the vocabulary's shards."""
  if axis_name is None:
    return stats
  # The largest lse only rescales: its gradient cancels, and pmax has none.
  top_N = jax.lax.pmax(jax.lax.stop_gradient(stats.lse_N), axis_name)
  shift_N = anchor(top_N)
  mass_N = jax.lax.psum(jnp.exp(stats.lse_N - shift_N), axis_name)
  target_N, total_N = jax.lax.psum((stats.target_N, stats.total_N), axis_name)
  return Statistics(shift_N + jnp.log(mass_N), target_N, total_N)


def sorted_order(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  bias_V: jax.Array | None,
  counted_N: jax.Array,
  options: Options,
) -> jax.Array:
  """Entries of the vocabulary by falling mean logit over the counted rows, so that large gradients share few tiles.

  The mean of the products is the product of the mean embedding: 2VD FLOPs and 4V bytes, and nothing to save.
  The cap on the logits is left out: an order needs no exact values.
  """
  dtype = accumulator(embeddings_ND.dtype)
  weight_N = counted_N / jnp.maximum(jnp.sum(counted_N), 1)
  shown_ND = jnp.where(counted_N[:, None], embeddings_ND, 0.0)
  mean_D = jnp.einsum(
    "n,nd->d", weight_N.astype(shown_ND.dtype), shown_ND, preferred_element_type=dtype
  )
  mean_V = jnp.einsum(
    f"d,{options.layout}->v",
    mean_D.astype(classifier.dtype),
    classifier,
    preferred_element_type=dtype,
  )
  mean_V = mean_V if bias_V is None else mean_V + bias_V
  return jnp.argsort(-mean_V).astype(jnp.int32)
