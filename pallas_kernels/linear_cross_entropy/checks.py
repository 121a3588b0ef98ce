"""What `linear_cross_entropy` refuses, and why."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_cross_entropy.terms import Options


def require(good: bool, argument: str, value: Any, rule: str) -> None:
  if not good:
    raise ValueError(f"{argument}={value}: {rule}")


def check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
  require(
    value in choices, argument, repr(value), f"must be one of {', '.join(map(repr, choices))}"
  )


def check_arrays(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  weights_N: jax.Array | None,
  layout: str,
) -> None:
  """Ranks, sizes and dtypes."""
  for name, array, rank in (
    ("embeddings_ND", embeddings_ND, 2),
    ("classifier", classifier, 2),
    ("labels_N", labels_N, 1),
    ("bias_V", bias_V, 1),
    ("weights_N", weights_N, 1),
  ):
    require(
      array is None or array.ndim == rank,
      f"{name}.shape",
      getattr(array, "shape", None),
      f"must have rank {rank}",
    )
  N, D = embeddings_ND.shape
  V, D_classifier = (classifier.shape[layout.index(letter)] for letter in "vd")
  require(
    D_classifier == D,
    "classifier.shape",
    classifier.shape,
    f"in layout {layout!r} its D must be {D}",
  )
  require(D > 0 and V > 0, "classifier.shape", classifier.shape, "V and D must be at least 1")
  for name, array, size in (
    ("labels_N", labels_N, N),
    ("weights_N", weights_N, N),
    ("bias_V", bias_V, V),
  ):
    require(
      array is None or array.size == size,
      f"{name}.shape",
      getattr(array, "shape", None),
      f"must be ({size},)",
    )
  floating = jnp.issubdtype(embeddings_ND.dtype, jnp.floating)
  require(floating, "embeddings_ND.dtype", embeddings_ND.dtype, "must be a floating type")
  require(
    classifier.dtype == embeddings_ND.dtype,
    "classifier.dtype",
    classifier.dtype,
    f"must be {embeddings_ND.dtype}",
  )
  require(
    jnp.issubdtype(labels_N.dtype, jnp.integer),
    "labels_N.dtype",
    labels_N.dtype,
    "must be an integer type",
  )
  for name, array in (("bias_V", bias_V), ("weights_N", weights_N)):
    good = array is None or jnp.issubdtype(array.dtype, jnp.floating)
    require(good, f"{name}.dtype", getattr(array, "dtype", None), "must be a floating type")


def check_axis(classifier: jax.Array, axis_name: str | tuple[str, ...] | None) -> None:
  names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
  varying = jax.typeof(classifier).mat.varying
  rule = f"the classifier must be split over it inside shard_map (check_vma=True); it is over {sorted(varying)}"
  require(set(names) <= set(varying), "axis_name", repr(axis_name), rule)


def check_options(
  *,
  softcap: float | None,
  temperature: float,
  label_smoothing: float,
  z_loss: float,
  filters: dict[str, float | str | None],
  sort_vocabulary: bool,
) -> None:
  """Ranges of the numbers, and options that exclude each other."""
  for name, value in (
    ("temperature", temperature),
    ("label_smoothing", label_smoothing),
    ("z_loss", z_loss),
  ):
    require(
      is_number(value),
      name,
      repr(value),
      "must be a finite number, known when the function is traced",
    )
  if softcap is not None:
    require(
      is_number(softcap) and softcap > 0,
      "softcap",
      repr(softcap),
      "must be None or a number above 0",
    )
  require(temperature > 0, "temperature", temperature, "must be above 0")
  require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "must lie in [0, 1)")
  require(z_loss >= 0, "z_loss", z_loss, "must be at least 0")
  for name, limit in filters.items():
    good = limit is None or limit == "auto" or (is_number(limit) and float(limit) > 0)
    require(good, name, repr(limit), 'must be None, "auto" or a number above 0')
    smooth = limit is not None and label_smoothing > 0
    require(
      not smooth,
      name,
      repr(limit),
      f"label_smoothing={label_smoothing} leaves no gradient small enough to skip",
    )
  used = any(value is not None for value in filters.values())
  require(
    used or not sort_vocabulary,
    "sort_vocabulary",
    sort_vocabulary,
    "only serves filter_e or filter_c",
  )


def is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_labels(
  labels_N: jax.Array, weights_N: jax.Array | None, ignore_index: int, vocabulary: int
) -> None:
  """The values of labels that are known to count: under jit a wrong label gives a NaN loss instead."""
  for array in (labels_N, weights_N):
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
      return
  known_N = np.asarray(labels_N)
  counted_N = (known_N != ignore_index) & (
    True if weights_N is None else np.asarray(weights_N) != 0
  )
  wrong_N = known_N[counted_N & ((known_N < 0) | (known_N >= vocabulary))]
  rule = f"labels lie in [0, {vocabulary}) or equal ignore_index={ignore_index}"
  require(wrong_N.size == 0, "labels_N", wrong_N[:8], rule)


def threshold(value: float | str | None, dtype: jax.typing.DTypeLike) -> float | None:
  """The number that a filter argument stands for; "auto" is what the gradient's own dtype could not resolve."""
  if value == "auto":
    return float(jnp.finfo(dtype).eps) / 32
  return None if value is None else float(value)


def make_options(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  *,
  softcap: float | None,
  temperature: float,
  label_smoothing: float,
  z_loss: float,
  layout: str,
  filter_e: float | str | None,
  filter_c: float | str | None,
  sort_vocabulary: bool,
  axis_name: str | tuple[str, ...] | None,
  interpret: bool,
) -> Options:
  """The checked options, with thresholds as numbers and the size of the whole vocabulary."""
  check_options(
    softcap=softcap,
    temperature=temperature,
    label_smoothing=label_smoothing,
    z_loss=z_loss,
    filters={"filter_e": filter_e, "filter_c": filter_c},
    sort_vocabulary=sort_vocabulary,
  )
  shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  return Options(
    vocabulary=classifier.shape[layout.index("v")] * shards,
    softcap=None if softcap is None else float(softcap),
    temperature=float(temperature),
    layout=layout,
    label_smoothing=float(label_smoothing),
    z_loss=float(z_loss),
    threshold_e=threshold(filter_e, embeddings_ND.dtype),
    threshold_c=threshold(filter_c, embeddings_ND.dtype),
    sort=sort_vocabulary,
    axis_name=axis_name,
    interpret=interpret,
  )
