"""`linear_cross_entropy`: cross-entropy of a linear classifier without its N x V logits in memory.

Here: the public function, what it refuses, the choice of implementation, and what one device does
with its shard. The mathematics is in `terms`, the loops over tiles in `xla` and the `pallas_*`.
"""

# N tokens, D model, V vocabulary
from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import shards
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.linear_cross_entropy import autodiff, filtering, reference, terms, xla
from pallas_kernels.linear_cross_entropy.filtering import Aux
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options, Statistics

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


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
  interpret: Any = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> Any:
  """Returns the cross-entropy in nats of a linear classifier, computed by tiles of its logits.

      u = (E C^T + b) / temperature
      x = softcap tanh(u / softcap), or u
      lse_i = log sum_v exp(x_iv)
      loss_i = lse_i - (1 - a) x_{i, label} - (a / V) sum_v x_iv + z_loss lse_i^2

  with a = label_smoothing. Products and sums are float32 (float64 for float64 inputs); gradients
  have their inputs' dtypes. Exact by default: `filter_e` and `filter_c` let the backward pass skip
  the product of a tile for the gradient of the embeddings or of the classifier, where every
  |softmax - onehot| of the tile is below the threshold. That makes rare tokens' rows of the
  classifier's gradient exactly 0, and where all logits are alike (1 / V below the threshold) it
  drops all but the targets' tiles: look at `return_aux` before trusting it in pre-training.

  Args:
    embeddings_ND: float32, bfloat16, float16 or float64 [N, D].
    classifier_VD: the same dtype, [V, D], or [D, V] with classifier_layout="dv".
    labels_N: integers [N] in [0, V) or ignore_index. Under jit any other label makes the loss NaN.
    bias_V: added to the products; any floating dtype.
    weights_N: floating, factor of each token's loss, by default 1; no gradient flows to it. A token
      of weight 0 counts as ignored.
    softcap: c above 0, or None.
    ignore_index: rows with this label have loss 0 and no gradient.
    reduction: "mean" over the rows that are not ignored, which divides by the sum of their weights
      (0 if there are none), "sum", or "none" for [N]: the negative of a token's loss is its
      log-probability.
    filter_e, filter_c: None, a threshold, or "auto": finfo(dtype).eps / 32 (2^-12 in bfloat16).
    sort_vocabulary: the backward pass visits the vocabulary by falling mean logit, so that filters
      keep fewer tiles.
    return_aux: also return the fractions of tiles that the filters keep; costs 2NVD FLOPs.
    implementation: for more than 4096 entries None takes "pallas_tpu" on TPU and "pallas_gpu" on
      one Hopper GPU, where they can run, else "xla". It keeps "xla" on a mesh of several GPUs,
      where "pallas_gpu" has never run. A named one runs or raises. "xla" with a scalar reduction
      makes the gradients in its forward pass: 6NVD FLOPs and R x V logits at a time (up to 4096
      entries, R is all N rows or what 32 MiB hold; above, N / 8, but 128 to 512), and a byte-level
      vocabulary costs what materialised logits cost. Where lse is differentiated, and for "none",
      the logits are computed twice, 8NVD. "reference" materialises the logits. "pallas_gpu"
      transposes a [D, V] classifier: one more copy of it from the forward to the backward pass, and
      one of its gradient.
    interpret: runs a named Pallas implementation on CPU. True: "pallas_tpu" in Pallas's plain
      interpreter, "pallas_gpu" (jax 0.11) in the simulator of a GPU. Or the parameters of a
      simulator: `pltpu.InterpretParams(...)` of a TPU's memories, copies, cores and races,
      `plgpu.InterpretGPUParams(...)` of a GPU's.
    axis_name: inside shard_map, the mesh axis that the classifier (and the bias) is split over by
      vocabulary. On Explicit meshes leave it None: the types say how tokens and vocabulary are
      spread.

  Returns:
    The loss, a float32 scalar or [N]; with return_lse a tuple that continues with float32 lse [N],
    of all rows; with return_aux one that ends with `Aux`.

  Raises:
    UserError: shapes, dtypes, option ranges, and values of labels where they are known.
    UnsupportedError: what the named implementation cannot do.

  Source: arXiv 2411.09009; label smoothing and z-loss as in their common definitions.
  """
  check_choice("reduction", reduction, ("mean", "sum", "none"))
  check_choice("classifier_layout", classifier_layout, ("vd", "dv"))
  inputs = Inputs(embeddings_ND, classifier_VD, labels_N, bias_V)
  V = check_arrays(inputs, weights_N, classifier_layout)
  check_axis(classifier_VD, axis_name)
  options = Options(
    vocabulary=V * (1 if axis_name is None else jax.lax.axis_size(axis_name)),
    softcap=softcap,
    temperature=temperature,
    layout=classifier_layout,
    label_smoothing=label_smoothing,
    z_loss=z_loss,
    threshold_e=_threshold(filter_e, embeddings_ND.dtype),
    threshold_c=_threshold(filter_c, embeddings_ND.dtype),
    sort=sort_vocabulary,
    axis_name=axis_name,
    interpret=interpret,
  )
  check_labels(labels_N, weights_N, ignore_index, options.vocabulary)
  token_axes, vocabulary_axes = find_split(inputs, options)
  if vocabulary_axes:
    options = dataclasses.replace(options, axis_name=vocabulary_axes)
  run_local = functools.partial(
    _run_local,
    options=options,
    name=choose(implementation, inputs, options),
    ignore_index=ignore_index,
    per_token=reduction == "none",
    with_aux=return_aux,
  )
  if token_axes or vocabulary_axes:
    classifier_axes = tuple(vocabulary_axes if a == "v" else () for a in classifier_layout)
    layouts = ((token_axes, ()), classifier_axes, (token_axes,), (vocabulary_axes,), (token_axes,))
    parts = shards.run_on_shards(
      run_local, (*inputs, weights_N), layouts, out_specs=P(token_axes or None)
    )
  else:
    parts = run_local(*inputs, weights_N)
  loss = parts.loss if reduction == "none" else jnp.sum(parts.loss)
  if reduction == "mean":
    divisor = jnp.sum(parts.weight)
    loss = loss / jnp.where(divisor == 0, 1, divisor)
  results = [loss]
  if return_lse:
    results.append(parts.lse_N)
  if return_aux:
    results.append(jax.tree.map(jnp.mean, parts.aux))
  return tuple(results) if len(results) > 1 else loss


class _Parts(NamedTuple):
  """What one shard of the tokens contributes; every array has a leading axis."""

  loss: jax.Array  # of every token, or [1] their sum
  weight: jax.Array  # [1] sum over the rows that are not ignored
  lse_N: jax.Array
  aux: Aux | None


def _run_local(
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
  dtype = terms.accumulator(embeddings_ND.dtype)
  counted_N = labels_N != ignore_index
  ones_or_weights_N: Any = 1.0
  if weights_N is not None:
    counted_N &= weights_N != 0
    ones_or_weights_N = jax.lax.stop_gradient(weights_N).astype(dtype)
  weight_N = jnp.where(counted_N, ones_or_weights_N, jnp.zeros((), dtype))
  # The weight of a wrong label is NaN, and with it its loss and its gradients.
  wrong_N = counted_N & ((labels_N < 0) | (labels_N >= options.vocabulary))
  weight_N = jnp.where(wrong_N, jnp.nan, weight_N)
  labels_N = labels_N.astype(jnp.int32)
  if options.axis_name is not None:
    entries = classifier.shape[options.vocabulary_axis]
    first = jax.lax.axis_index(options.axis_name) * entries
    labels_N = labels_N - first.astype(jnp.int32)
  embeddings_ND, classifier, bias_V = shards.vary_together(embeddings_ND, classifier, bias_V)
  inputs, options = arrange(name, Inputs(embeddings_ND, classifier, labels_N, bias_V), options)
  weight = jnp.sum(weight_N, keepdims=True)
  if labels_N.size == 0:
    aux = Aux(jnp.ones(1), jnp.ones(1)) if with_aux else None
    return _Parts(jnp.zeros(0 if per_token else 1, dtype), weight, jnp.zeros(0, dtype), aux)
  one_pass = name == "xla" and not per_token
  if one_pass:
    total, lse_N = xla.loss_sum(inputs, weight_N, options)
    loss = total[None]
  else:
    stats = _statistics(name, inputs, options)
    loss_N = weight_N * terms.row_loss(terms.mask_uncounted(stats, counted_N), options)
    loss, lse_N = loss_N if per_token else jnp.sum(loss_N, keepdims=True), stats.lse_N
  aux = _kept_tiles(name, one_pass, inputs, weight_N, options) if with_aux else None
  return _Parts(loss, weight, lse_N, aux)


def arrange(name: str, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
  """Transposes the classifier where the implementation needs the other layout, or is faster so."""
  layout = options.layout
  if name == "pallas_gpu":
    layout = "vd"
  elif name == "xla" and options.entries(inputs) <= xla.SMALL_VOCABULARY:
    layout = "dv"
  if layout == options.layout:
    return inputs, options
  transposed = inputs._replace(classifier=inputs.classifier.T)
  return transposed, dataclasses.replace(options, layout=layout)


def _statistics(name: str, inputs: Inputs, options: Options) -> Statistics:
  if name == "reference":
    return terms.combine_shards(reference.statistics(inputs, options), options)
  return autodiff.statistics(inputs, options, _load(name))


def _kept_tiles(
  name: str, one_pass: bool, inputs: Inputs, weight_N: jax.Array, options: Options
) -> Aux:
  """Fractions of tiles that the backward pass of the summed loss keeps, averaged over shards."""
  inputs = jax.lax.stop_gradient(inputs)
  stats = _statistics(name, inputs, options)
  factors = terms.row_factors(stats, jax.grad(terms.total_loss)(stats, weight_N, options))
  if one_pass:
    size = xla.one_pass_tile(inputs.labels_N.size, options.entries(inputs))
  else:
    size = _load(name).backward_tile(inputs, options)
  aux = filtering.kept_tiles(inputs, factors, size, options)
  aux = aux if options.axis_name is None else jax.lax.pmean(aux, options.axis_name)
  return jax.tree.map(lambda fraction: fraction[None], aux)


def choose(implementation: Implementation | None, inputs: Inputs, options: Options) -> str:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def unsupported(name: str) -> str | None:
    if implementation is None and options.entries(inputs) <= xla.SMALL_VOCABULARY:
      return f"a vocabulary of {options.entries(inputs)} entries needs no kernel"
    if implementation is None and name == "pallas_gpu" and shards.mesh_size(inputs) > 1:
      return "it has not run on several GPUs"
    return _load(name).unsupported(inputs, options)

  filters = options.threshold_e or options.threshold_c
  if implementation == "reference" and filters:
    reason = "it is exact and has no tiles for filter_e or filter_c to skip"
    raise UnsupportedError(f"implementation={implementation!r}: {reason}")
  return choose_implementation(
    "linear_cross_entropy", implementation, KERNELS, unsupported, options.interpret
  )


def find_split(inputs: Inputs, options: Options) -> tuple[shards.Axes, shards.Axes]:
  """Returns the mesh axes that tokens and vocabulary are spread over, as the inputs' types say.

  Both are empty on one device and inside shard_map. Raises UserError for a spread of D, and for
  one axis that spreads both.
  """
  embeddings_ND, classifier, *_ = inputs
  model_axis = 1 - options.vocabulary_axis
  token_axes = shards.sharded_axes(embeddings_ND, 0)
  vocabulary_axes = shards.sharded_axes(classifier, options.vocabulary_axis)
  for name, array, axis in (
    ("embeddings_ND", embeddings_ND, 1),
    ("classifier", classifier, model_axis),
  ):
    axes = shards.sharded_axes(array, axis)
    check(not axes, name, jax.typeof(array), f"gather its D first, it is spread over {axes}")
  both = set(token_axes) & set(vocabulary_axes)
  rule = f"tokens and vocabulary are both spread over {both}"
  check(not both, "classifier", jax.typeof(classifier), rule)
  for name, array, summed in (
    ("embeddings_ND", embeddings_ND, vocabulary_axes),
    ("classifier", classifier, token_axes),
  ):
    stray = jax.typeof(array).sharding.spec.reduced - set(summed)
    check(not stray, name, jax.typeof(array), f"nothing here is summed over {sorted(stray)}")
  return token_axes, vocabulary_axes


def check_arrays(inputs: Inputs, weights_N: jax.Array | None, layout: str) -> int:
  """Checks ranks, sizes and dtypes; returns the number of entries of the vocabulary."""
  embeddings_ND, classifier, labels_N, bias_V = inputs
  check_shape("embeddings_ND", embeddings_ND, (None, None))
  check_shape("classifier", classifier, (None, None))
  N, D = embeddings_ND.shape
  V = classifier.shape[layout.index("v")]
  check(D > 0 and V > 0, "classifier.shape", classifier.shape, "V and D must be at least 1")
  check_shape("classifier", classifier, (V, D) if layout == "vd" else (D, V))
  check_shape("labels_N", labels_N, (N,))
  check_dtype("embeddings_ND", embeddings_ND, jnp.floating)
  check_dtype("classifier", classifier, embeddings_ND.dtype)
  check_dtype("labels_N", labels_N, jnp.integer)
  for name, array, size in (("bias_V", bias_V, V), ("weights_N", weights_N, N)):
    if array is not None:
      check_shape(name, array, (size,))
      check_dtype(name, array, jnp.floating)
  return V


def check_axis(classifier: jax.Array, axis_name: str | tuple[str, ...] | None) -> None:
  """Checks that inside shard_map the classifier varies over the axis that is said to split it."""
  names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
  varying = shards.varying_axes(classifier)
  rule = "the classifier must be split over it inside shard_map (check_vma=True); it is over"
  check(set(names) <= varying, "axis_name", axis_name, f"{rule} {sorted(varying)}")


def check_labels(
  labels_N: jax.Array, weights_N: jax.Array | None, ignore_index: int, vocabulary: int
) -> None:
  """Checks labels that are known to count: under jit a wrong label gives a NaN loss instead."""
  for array in (labels_N, weights_N):
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
      return
  known_N = np.asarray(labels_N)
  counted_N = known_N != ignore_index
  if weights_N is not None:
    counted_N = counted_N & (np.asarray(weights_N) != 0)
  wrong_N = known_N[counted_N & ((known_N < 0) | (known_N >= vocabulary))]
  rule = f"labels lie in [0, {vocabulary}) or equal ignore_index={ignore_index}"
  check(wrong_N.size == 0, "labels_N", wrong_N[:8].tolist(), rule)


def _threshold(value: float | str | None, dtype: jax.typing.DTypeLike) -> Any:
  """Returns what a filter argument stands for; "auto" is what the dtype could not resolve."""
  return float(jnp.finfo(dtype).eps) / 32 if value == "auto" else value


def _load(name: str) -> ModuleType:
  """Imports the module of an implementation when it is first chosen: Mosaic GPU takes 0.4 s."""
  return importlib.import_module(f"{__package__}.{name}")
