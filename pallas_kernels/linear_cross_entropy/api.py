"""`linear_cross_entropy`: cross-entropy of a linear classifier without its N x V logits in memory."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import dataclasses
import functools
import logging
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import (
  autodiff,
  blocks,
  checks,
  filtering,
  mesh,
  pallas_gpu,
  pallas_tpu,
  terms,
  xla,
)
from pallas_kernels.linear_cross_entropy import reference as materialised
from pallas_kernels.linear_cross_entropy.filtering import Aux
from pallas_kernels.linear_cross_entropy.terms import Options, Statistics

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
PALLAS: dict[str, ModuleType] = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
BACKENDS: dict[str, ModuleType] = {"xla": xla, **PALLAS}
IMPLEMENTATIONS = ("reference", *BACKENDS)


def linear_cross_entropy(
  embeddings_ND: jax.Array,
  classifier_VD: jax.Array,
  labels_N: jax.Array,
  *,
  bias_V: jax.Array | None = None,
  weights_N: jax.Array | None = None,
  softcap: float | None = None,
  temperature: float = 1.0,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  ignore_index: int = -100,
  reduction: Literal["mean", "sum", "none"] = "mean",
  return_lse: bool = False,
  classifier_layout: Literal["vd", "dv"] = "vd",
  filter_e: float | Literal["auto"] | None = None,
  filter_c: float | Literal["auto"] | None = None,
  sort_vocabulary: bool = False,
  return_aux: bool = False,
  implementation: Implementation | None = None,
  interpret: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> Any:
  """Cross-entropy in nats of softmax(softcap(embeddings @ classifier.T + bias) / temperature), by tiles of the logits.

      u = (E C^T + b) / temperature     x = softcap tanh(u / softcap), or u     lse_i = log sum_v exp(x_iv)
      loss_i = lse_i - (1 - a) x_{i, label} - (a / V) sum_v x_iv + z_loss lse_i^2       a = label_smoothing

  Products and sums are float32 (float64 for float64 inputs); gradients have their inputs' dtypes. Exact by default:
  `filter_e` and `filter_c` let the backward pass skip the product of a tile for the gradient of the embeddings or of
  the classifier, where every |softmax - onehot| of the tile is below the threshold. That makes rare tokens' rows of
  the classifier's gradient exactly 0, and where all logits are alike (1 / V below the threshold) it drops all but the
  targets' tiles: look at `return_aux` before trusting it in pre-training.

  Args:
    embeddings_ND: float32, bfloat16, float16 or float64 [N, D].
    classifier_VD: the same dtype, [V, D], or [D, V] with classifier_layout="dv".
    labels_N: integers [N] in [0, V) or ignore_index. Under jit any other label makes the loss NaN.
    bias_V: added to the products; any floating dtype.
    weights_N: floating, factor of each token's loss, by default 1; no gradient flows to it. A token of weight 0 counts
      as ignored.
    softcap: c above 0, or None.
    ignore_index: rows with this label have loss 0 and no gradient.
    reduction: "mean" over the rows that are not ignored, which divides by the sum of their weights (0 if there are
      none), "sum", or "none" for [N]: the negative of a token's loss is its log-probability.
    filter_e, filter_c: None, a threshold, or "auto": finfo(dtype).eps / 32 (2^-12 in bfloat16).
    sort_vocabulary: the backward pass visits the vocabulary by falling mean logit, so that filters keep fewer tiles.
    return_aux: also return the fractions of tiles that the filters keep; costs 2NVD FLOPs.
    implementation: None takes "pallas_tpu" on TPU for more than 4096 entries, else "xla"; a named one runs or raises.
      "pallas_gpu" (Hopper) lowers but has never been run, and is taken only by name.
      "xla" with a scalar reduction makes the gradients in its forward pass: 6NVD FLOPs and R x V logits at a time (up
      to 4096 entries, R is all N rows or what 32 MiB hold; above, N / 8, but 128 to 512), and a byte-level vocabulary
      costs what materialised logits cost. Where lse is differentiated, and for "none", the logits are computed twice,
      8NVD. "reference" materialises the logits.
    interpret: run a named Pallas implementation in Pallas's interpreter.
    axis_name: inside shard_map, the mesh axis that the classifier (and the bias) is split over by vocabulary.
      On Explicit meshes leave it None: the types say how tokens and vocabulary are spread.

  Returns:
    The loss, a float32 scalar or [N]; with return_lse a tuple that continues with float32 lse [N], of all rows; with
    return_aux one that ends with `Aux`.

  Raises:
    ValueError: shapes, dtypes, option ranges, and values of labels where they are known.
    NotImplementedError: what the named implementation cannot do.

  Source: arXiv 2411.09009; label smoothing and z-loss as in their common definitions.
  """
  checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
  checks.check_choice("classifier_layout", classifier_layout, ("vd", "dv"))
  checks.check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))
  checks.check_arrays(embeddings_ND, classifier_VD, labels_N, bias_V, weights_N, classifier_layout)
  checks.check_axis(classifier_VD, axis_name)
  options = checks.make_options(
    embeddings_ND,
    classifier_VD,
    softcap=softcap,
    temperature=temperature,
    label_smoothing=label_smoothing,
    z_loss=z_loss,
    layout=classifier_layout,
    filter_e=filter_e,
    filter_c=filter_c,
    sort_vocabulary=sort_vocabulary,
    axis_name=axis_name,
    interpret=interpret,
  )
  checks.check_labels(labels_N, weights_N, ignore_index, options.vocabulary)
  split = mesh.explicit_split(embeddings_ND, classifier_VD, classifier_layout)
  if split is not None and split.vocabulary:
    options = dataclasses.replace(options, axis_name=split.vocabulary)
  name = choose(implementation, embeddings_ND, classifier_VD, options)
  local = functools.partial(
    _local,
    options=options,
    name=name,
    ignore_index=ignore_index,
    per_token=reduction == "none",
    with_aux=return_aux,
  )
  arrays = (embeddings_ND, classifier_VD, labels_N, bias_V, weights_N)
  parts = (
    local(*arrays)
    if split is None
    else mesh.run_on_shards(local, split, classifier_layout, *arrays)
  )
  loss = parts.loss if reduction == "none" else jnp.sum(parts.loss)
  if reduction == "mean":
    divisor = jnp.sum(parts.weight)
    loss = loss / jnp.where(divisor == 0, 1, divisor)
  aux = None if parts.aux is None else jax.tree.map(jnp.mean, parts.aux)
  returned = (loss, *((parts.lse_N,) if return_lse else ()), *((aux,) if return_aux else ()))
  return returned if len(returned) > 1 else loss


class _Parts(NamedTuple):
  """What one shard of the tokens contributes; every array has a leading axis."""

  loss: jax.Array  # of every token, or [1] their sum
  weight: jax.Array  # [1] sum over the rows that are not ignored
  lse_N: jax.Array
  aux: Aux | None


def _local(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  weights_N: jax.Array | None,
  *,
  options: Options,
  name: str,
  ignore_index: int,
  per_token: bool,
  with_aux: bool,
) -> _Parts:
  dtype, counted_N = terms.accumulator(embeddings_ND.dtype), labels_N != ignore_index
  if weights_N is not None:
    counted_N &= weights_N != 0
  ones_or_weights_N = 1.0 if weights_N is None else jax.lax.stop_gradient(weights_N).astype(dtype)
  weight_N = jnp.where(counted_N, ones_or_weights_N, jnp.zeros((), dtype))
  # The weight of a wrong label is NaN, and with it its loss and its gradients.
  weight_N = jnp.where(
    counted_N & ((labels_N < 0) | (labels_N >= options.vocabulary)), jnp.nan, weight_N
  )
  labels_N = labels_N.astype(jnp.int32)
  if options.axis_name is not None:
    first = jax.lax.axis_index(options.axis_name) * classifier.shape[options.vocabulary_axis]
    labels_N = labels_N - first.astype(jnp.int32)
  embeddings_ND, classifier, bias_V = mesh.vary_together(embeddings_ND, classifier, bias_V)
  if name == "xla" and options.layout == "vd" and classifier.shape[0] <= blocks.SMALL_VOCABULARY:
    classifier, options = (
      classifier.T,
      dataclasses.replace(options, layout="dv"),
    )  # the faster one for short rows
  arrays = (embeddings_ND, classifier, labels_N, bias_V)
  weight = jnp.sum(weight_N, keepdims=True)
  if labels_N.size == 0:
    none = jnp.zeros(0, dtype)
    aux = Aux(jnp.ones(1), jnp.ones(1)) if with_aux else None
    return _Parts(none if per_token else jnp.zeros(1, dtype), weight, none, aux)
  fused = name == "xla" and not per_token
  if fused:
    total, lse_N = autodiff.loss_sum(*arrays, weight_N, options)
    loss = total[None]
  else:
    stats = _statistics(name, *arrays, options)
    loss = weight_N * terms.row_loss(terms.keep_counted(stats, counted_N), options)
    loss, lse_N = loss if per_token else jnp.sum(loss, keepdims=True), stats.lse_N
  aux = _aux(name, fused, *arrays, weight_N, options) if with_aux else None
  return _Parts(loss, weight, lse_N, aux)


def _statistics(
  name: str,
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
) -> Statistics:
  if name == "reference":
    return terms.combine(
      materialised.statistics(embeddings_ND, classifier, labels_N, bias_V, options),
      options.axis_name,
    )
  return autodiff.statistics(embeddings_ND, classifier, labels_N, bias_V, options, BACKENDS[name])


def _aux(
  name: str,
  fused: bool,
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  weight_N: jax.Array,
  options: Options,
) -> Aux:
  """Fractions of tiles that the backward pass of the sum of the loss keeps, mean over the vocabulary's shards."""
  arrays = jax.lax.stop_gradient((embeddings_ND, classifier, labels_N, bias_V))
  stats = _statistics(name, *arrays, options)
  rows = terms.backward_rows(stats, jax.grad(terms.total_loss)(stats, weight_N, options))
  N, V = labels_N.size, classifier.shape[options.vocabulary_axis]
  size = (
    blocks.xla_chunk(N, V)
    if fused
    else BACKENDS[name].backward_tile(embeddings_ND, classifier, options)
  )
  aux = filtering.kept_tiles(*arrays, rows, size, options)
  aux = aux if options.axis_name is None else jax.lax.pmean(aux, options.axis_name)
  return jax.tree.map(lambda fraction: fraction[None], aux)


def choose(
  implementation: Implementation | None,
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  options: Options,
) -> str:
  """The implementation to run; NotImplementedError when the named one cannot."""
  if implementation is None:
    large = classifier.shape[options.vocabulary_axis] > blocks.SMALL_VOCABULARY
    fits = (
      platform() == "tpu"
      and large
      and pallas_tpu.unsupported(embeddings_ND, classifier, options) is None
    )
    implementation = "pallas_tpu" if fits else "xla"
    _announce(implementation, platform())
  if implementation == "reference" and (options.threshold_e or options.threshold_c):
    raise NotImplementedError(
      "implementation='reference' is exact: it has no tiles for filter_e or filter_c to skip"
    )
  reason = (
    PALLAS[implementation].unsupported(embeddings_ND, classifier, options)
    if implementation in PALLAS
    else None
  )
  if reason is not None:
    raise NotImplementedError(f"implementation={implementation!r}: {reason}")
  checks.require(
    implementation in PALLAS or not options.interpret,
    "interpret",
    True,
    f"names one of {list(PALLAS)}",
  )
  return implementation


def platform() -> str:
  """Of the mesh in use, else of the default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


@functools.cache
def _announce(implementation: str, on: str) -> None:
  logging.getLogger(__name__).info("linear_cross_entropy runs %s on %s", implementation, on)
