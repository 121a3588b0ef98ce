"""Defines the records and the mathematics that every implementation of the loss shares.

    u = (E C^T + b) / temperature
    x = softcap * tanh(u / softcap), or u
    lse_i = log sum_v exp(x_iv)

The loss of a token needs three numbers of its row of logits: lse, the logit of its target, and the
sum of the row (for label smoothing). Implementations compute those (`Statistics`) and, given the
cotangents of the three, the gradients of E, C and b (`Gradients`). Everything between the three
numbers and the scalar loss is `row_loss`, which JAX differentiates.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009,
sections 3 and 4.
"""

# N tokens, D model, V vocabulary. Tiles may have the vocabulary first or last: these functions
# broadcast.
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_choice, check_number, is_number


class Inputs(NamedTuple):
  """Holds the arrays of the operation; of one shard inside shard_map."""

  embeddings_ND: jax.Array
  classifier: jax.Array  # [V, D], or [D, V] with Options.layout "dv"
  labels_N: jax.Array
  bias_V: jax.Array | None


class Statistics(NamedTuple):
  """Holds what the loss needs of each row of logits, in float32 (float64 for float64 inputs).

  Cotangents have the same form.
  """

  lse_N: jax.Array
  target_N: jax.Array  # 0 where the label names no entry of the vocabulary
  total_N: jax.Array  # 0 unless Options.needs_total


class RowFactors(NamedTuple):
  """Holds each row's factors in the backward pass (`row_factors`): arrays, blocks in kernels."""

  lse_N: Any
  scale_N: Any
  at_target_N: Any
  offset_N: Any
  unit_N: Any
  active_N: Any


class Gradients(NamedTuple):
  """Holds gradients in the accumulator's dtype; bias_V is None where there is no bias."""

  embeddings_ND: jax.Array
  classifier: jax.Array
  bias_V: jax.Array | None


class TileSize(NamedTuple):
  """Counts the rows of E and the entries of C in one tile of logits."""

  rows: int
  entries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Holds what is fixed at trace time. Raises UserError for values out of range."""

  vocabulary: int
  """V, all shards together."""
  softcap: float | None = None
  temperature: float = 1.0
  layout: str = "vd"
  """"vd": the classifier is [V, D]; "dv": it is [D, V]."""
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  threshold_e: float | None = None
  """Skip a tile's product for the gradient of E where all |softmax - onehot| are below this."""
  threshold_c: float | None = None
  """The same for the gradient of C."""
  sort: bool = False
  """Visit the vocabulary by falling mean logit in the backward pass."""
  axis_name: str | tuple[str, ...] | None = None
  """Mesh axis that the vocabulary is split over, inside shard_map."""
  interpret: Any = False
  """Run Pallas kernels in the interpreter: True, or the parameters of a chip's simulator."""

  def __post_init__(self) -> None:
    check_choice("classifier_layout", self.layout, ("vd", "dv"))
    check_number("temperature", self.temperature, above=0)
    check_number("label_smoothing", self.label_smoothing)
    in_range = 0 <= self.label_smoothing < 1
    check(in_range, "label_smoothing", self.label_smoothing, "must lie in [0, 1)")
    check_number("z_loss", self.z_loss, at_least=0)
    if self.softcap is not None:
      check_number("softcap", self.softcap, above=0)
    thresholds = {"filter_e": self.threshold_e, "filter_c": self.threshold_c}
    for name, threshold in thresholds.items():
      if threshold is not None:
        good = is_number(threshold) and threshold > 0
        check(good, name, threshold, 'must be None, "auto" or a number above 0')
        rule = f"label_smoothing={self.label_smoothing} leaves no gradient small enough to skip"
        check(self.label_smoothing == 0, name, threshold, rule)
    filtered = any(threshold is not None for threshold in thresholds.values())
    check(filtered or not self.sort, "sort_vocabulary", self.sort, "only serves the filters")

  @property
  def needs_total(self) -> bool:
    """Returns whether the loss needs the sum of every row's logits."""
    return self.label_smoothing > 0

  @property
  def vocabulary_axis(self) -> int:
    """Returns the axis of the classifier that counts entries of the vocabulary."""
    return self.layout.index("v")

  def entries(self, inputs: Inputs) -> int:
    """Returns the size of this shard of the vocabulary."""
    return inputs.classifier.shape[self.vocabulary_axis]


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Returns the dtype of products and sums: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def logits(product: jax.Array, bias: jax.Array | None, options: Options) -> jax.Array:
  """Returns x of a tile from its product E C^T; `bias` broadcasts against it."""
  u = product if bias is None else product + bias
  u = u if options.temperature == 1.0 else u * (1.0 / options.temperature)
  return u if options.softcap is None else options.softcap * jnp.tanh(u * (1.0 / options.softcap))


def logit_slope(x: jax.Array, options: Options) -> jax.Array | float:
  """Returns d logit / d product, from the logit."""
  if options.softcap is None:
    return 1.0 / options.temperature
  scaled = x * (1.0 / options.softcap)
  return (1.0 - scaled * scaled) * (1.0 / options.temperature)


def row_loss(stats: Statistics, options: Options) -> jax.Array:
  """Returns each token's loss in nats: lse - (1 - a) target - (a / V) total + z lse^2."""
  loss_N = stats.lse_N - (1.0 - options.label_smoothing) * stats.target_N
  if options.needs_total:
    loss_N = loss_N - (options.label_smoothing / options.vocabulary) * stats.total_N
  return loss_N + options.z_loss * jnp.square(stats.lse_N) if options.z_loss else loss_N


def mask_uncounted(stats: Statistics, counted_N: jax.Array) -> Statistics:
  """Zeroes rows that do not count: their values and gradients, NaN too, do not reach the loss.

  A row whose logits are all -inf has no distribution: lse is -inf, its loss and gradient are 0.
  """
  counted_N = counted_N & (stats.lse_N != -jnp.inf)
  return Statistics(*(jnp.where(counted_N, value_N, 0.0) for value_N in stats))


def total_loss(stats: Statistics, weight_N: jax.Array, options: Options) -> jax.Array:
  """Returns the sum of the rows' losses times their weights; a row of weight 0 does not count."""
  return jnp.sum(weight_N * row_loss(mask_uncounted(stats, weight_N != 0), options))


def row_factors(stats: Statistics, cotangents: Statistics) -> RowFactors:
  """Returns the factors of the logits' gradient, see `logit_gradient`.

  At the target it is scale * (p - 1) + (scale + ct_target), with p - 1 from expm1: exp(...) - 1 has
  lost all its digits once p is near 1. Rows without any cotangent are inactive: their lse is +inf,
  so that they add nothing.
  """
  scale_N, target_N, offset_N = cotangents
  active_N = ((scale_N != 0) | (target_N != 0) | (offset_N != 0)) & (stats.lse_N != -jnp.inf)
  at_target_N = scale_N * jnp.expm1(stats.target_N - stats.lse_N) + (scale_N + target_N)
  scale_unit_N = jnp.where(scale_N != 0, jnp.abs(scale_N), 1.0)
  factors = RowFactors(
    lse_N=stats.lse_N,
    scale_N=scale_N,
    at_target_N=at_target_N,
    offset_N=offset_N,
    unit_N=jnp.where(target_N != 0, jnp.abs(target_N), scale_unit_N),
    active_N=jnp.ones_like(active_N),
  )
  return deactivate_rows(factors, ~active_N)


def deactivate_rows(factors: RowFactors, inactive_N: jax.Array) -> RowFactors:
  """Makes these rows add nothing to any gradient."""
  active_N = factors.active_N & ~inactive_N
  return RowFactors(
    lse_N=jnp.where(active_N, factors.lse_N, jnp.inf),
    scale_N=jnp.where(active_N, factors.scale_N, 0.0),
    at_target_N=jnp.where(active_N, factors.at_target_N, 0.0),
    offset_N=jnp.where(active_N, factors.offset_N, 0.0),
    unit_N=factors.unit_N,
    active_N=active_N,
  )


def logit_gradient(
  x: jax.Array, hit: jax.Array, factors: RowFactors, options: Options
) -> jax.Array:
  """Returns d loss / d logit of a tile: offset + where(hit, at_target, scale exp(x - lse)).

  `factors` broadcast against it, `hit` marks the targets.
  """
  gradient = jnp.where(hit, factors.at_target_N, factors.scale_N * jnp.exp(x - factors.lse_N))
  return gradient + factors.offset_N if options.needs_total else gradient


def passes_filter(
  gradient: jax.Array, factors: RowFactors, threshold: float | None
) -> jax.Array | bool:
  """Tells whether some |softmax - onehot| of a tile reaches the threshold, or is NaN."""
  if threshold is None:
    return True
  return jnp.any(~(jnp.abs(gradient) < threshold * factors.unit_N))


def add_exponentials(
  top: jax.Array, mass: jax.Array, x: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  """Adds a tile to a running log-sum-exp: largest logit so far, sum of exp(x - anchor(largest))."""
  new_top = jnp.maximum(top, jnp.max(x, axis=axis, keepdims=top.ndim == x.ndim))
  shift = anchor(new_top)
  shift_x = shift if shift.ndim == x.ndim else jnp.expand_dims(shift, axis)
  added = jnp.sum(jnp.exp(x - shift_x), axis=axis, keepdims=top.ndim == x.ndim)
  return new_top, mass * jnp.exp(top - shift) + added


def log_sum_exp(top: jax.Array, mass: jax.Array) -> jax.Array:
  """Returns the log-sum-exp of all tiles that `add_exponentials` has seen."""
  return anchor(top) + jnp.log(mass)


def anchor(top: jax.Array) -> jax.Array:
  """Returns what exponents are relative to: `top` where finite (inf - inf would be NaN), else 0."""
  return jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)


def combine_shards(stats: Statistics, options: Options) -> Statistics:
  """Returns the statistics of whole rows from those of the vocabulary's shards."""
  axis_name = options.axis_name
  if axis_name is None:
    return stats
  # The largest lse only rescales: its gradient cancels, and pmax has none.
  top_N = jax.lax.pmax(jax.lax.stop_gradient(stats.lse_N), axis_name)
  shift_N = anchor(top_N)
  mass_N = jax.lax.psum(jnp.exp(stats.lse_N - shift_N), axis_name)
  target_N, total_N = jax.lax.psum((stats.target_N, stats.total_N), axis_name)
  return Statistics(shift_N + jnp.log(mass_N), target_N, total_N)


def vocabulary_order(inputs: Inputs, counted_N: jax.Array, options: Options) -> jax.Array | None:
  """Returns the entries by falling mean logit over the counted rows, int32 [V]; None unless sorted.

  So large gradients share few tiles. The mean of the products is the product of the mean
  embedding: 2VD FLOPs and 4V bytes, and nothing to save. The cap on the logits is left out: an
  order needs no exact values.
  """
  if not options.sort:
    return None
  embeddings_ND, classifier, _, bias_V = inputs
  dtype = accumulator(embeddings_ND.dtype)
  weight_N = counted_N / jnp.maximum(jnp.sum(counted_N), 1)
  counted_ND = jnp.where(counted_N[:, None], embeddings_ND, 0.0)
  mean_D = jnp.einsum(
    "n,nd->d", weight_N.astype(counted_ND.dtype), counted_ND, preferred_element_type=dtype
  )
  mean_V = jnp.einsum(
    f"d,{options.layout}->v",
    mean_D.astype(classifier.dtype),
    classifier,
    preferred_element_type=dtype,
  )
  mean_V = mean_V if bias_V is None else mean_V + bias_V
  return jnp.argsort(-mean_V).astype(jnp.int32)


def pull_back_statistics(
  gradients: Callable[[Inputs, RowFactors, Options], Gradients],
  inputs: Inputs,
  stats: Statistics,
  cotangents: Statistics,
  options: Options,
) -> Inputs:
  """Returns the inputs' cotangents from those of their statistics, by a backend's `gradients`."""
  scale = float16_scale(inputs.embeddings_ND.dtype, cotangents)
  factors = row_factors(stats, jax.tree.map(lambda c_N: c_N / scale, cotangents))
  return input_cotangents(gradients(inputs, factors, options), scale, inputs)


def input_cotangents(sums: Gradients, factor: jax.Array | float, inputs: Inputs) -> Inputs:
  """Returns the gradients times `factor` in the dtypes of the inputs."""

  def finish(gradient: Any, array: jax.Array | None) -> Any:
    return None if array is None else (factor * gradient).astype(array.dtype)

  return Inputs(
    embeddings_ND=finish(sums.embeddings_ND, inputs.embeddings_ND),
    classifier=finish(sums.classifier, inputs.classifier),
    labels_N=None,  # type: ignore[arg-type]
    bias_V=finish(sums.bias_V, inputs.bias_V),
  )


def float16_scale(dtype: jnp.dtype, cotangents: Any) -> jax.Array | float:
  """Returns what to divide cotangents by: in float16 those of a mean over many tokens underflow."""
  if dtype != jnp.float16:
    return 1.0
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(c_N)) for c_N in jax.tree.leaves(cotangents)]))
  return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1.0)
