"""Inputs that are spread over a mesh: tokens over the batch axes, the vocabulary over its own."""

# N tokens, D model, V vocabulary
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_cross_entropy.checks import require

Axes = tuple[str, ...]


class Split(NamedTuple):
  """Mesh axes (Explicit ones) that the tokens and the vocabulary are spread over."""

  tokens: Axes
  vocabulary: Axes


def axes_of(array: jax.Array, dimension: int) -> Axes:
  entry = jax.typeof(array).sharding.spec.partitions[dimension]
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def explicit_split(embeddings_ND: jax.Array, classifier: jax.Array, layout: str) -> Split | None:
  """How the types of the inputs say that they are spread; None on one device and inside shard_map."""
  split = Split(axes_of(embeddings_ND, 0), axes_of(classifier, layout.index("v")))
  for name, axes in (
    ("embeddings_ND", axes_of(embeddings_ND, 1)),
    ("classifier", axes_of(classifier, layout.index("d"))),
  ):
    require(
      not axes, name, jax.typeof(embeddings_ND), f"gather its D first, it is spread over {axes}"
    )
  both = set(split.tokens) & set(split.vocabulary)
  require(
    not both,
    "classifier",
    jax.typeof(classifier),
    f"tokens and vocabulary are both spread over {both}",
  )
  for name, array, other in (
    ("embeddings_ND", embeddings_ND, split.vocabulary),
    ("classifier", classifier, split.tokens),
  ):
    stray = jax.typeof(array).sharding.spec.reduced - set(other)
    require(not stray, name, jax.typeof(array), f"nothing here is summed over {sorted(stray)}")
  return split if split.tokens or split.vocabulary else None


def run_on_shards(
  local: Callable[..., Any],
  split: Split,
  layout: str,
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  weights_N: jax.Array | None,
) -> Any:
  """Calls `local` on every device's shards; each array that it returns has a leading axis spread like the tokens.

  Arrays whose type says `reduced` stay so: their gradients leave as the devices' unsummed shares.
  """
  tokens, vocabulary = split.tokens or None, split.vocabulary or None
  classifier_axes = (vocabulary if letter == "v" else None for letter in layout)

  def placed(array: jax.Array | None, *axes: Axes | None) -> jax.Array | None:
    return (
      None
      if array is None
      else jax.reshard(array, P(*axes, reduced=jax.typeof(array).sharding.spec.reduced))
    )

  arrays = (
    placed(embeddings_ND, tokens, None),
    placed(classifier, *classifier_axes),
    placed(labels_N, tokens),
    placed(bias_V, vocabulary),
    placed(weights_N, tokens),
  )
  specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, arrays)
  return jax.shard_map(local, in_specs=specs, out_specs=P(tokens))(*arrays)


def vary_together(*arrays: Any) -> Any:
  """Inside shard_map, makes all arrays vary over every axis that one of them varies over.

  The transpose of that cast is the sum over the axis: it reduces the gradient of the embeddings over the vocabulary's
  shards and the gradient of the classifier over the tokens' shards. Over axes that an array is `reduced` over its
  gradient is left unsummed.
  """
  everywhere = set().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(arrays)))

  def cast(array: jax.Array) -> jax.Array:
    kind = jax.typeof(array).mat
    missing = everywhere - kind.varying
    for axes in (missing & kind.reduced, missing - kind.reduced):
      array = jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
    return array

  return jax.tree.map(cast, arrays)
