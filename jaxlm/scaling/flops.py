"""Counts parameters and training FLOPs of a decoder from its configuration."""

# B rows, T positions, D model, N query heads, H head width, F feed-forward, V vocabulary

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxlm.config import LayerSpec, ModelConfig, check
from jaxlm.scaling.mixers import mixing_flops, other_entries, projection_entries


class Parameters(NamedTuple):
  """Holds how many numbers each part learns; laws differ in which parts they call N."""

  embedding: int
  """V D"""
  blocks: int
  """mixers, feed-forwards and norms of all layers"""
  head: int
  """final norm, and the output matrix D V unless it is tied to the embedding"""

  @property
  def total(self) -> int:
    """Returns the sum of all parts."""
    return self.embedding + self.blocks + self.head


def parameter_count(config: ModelConfig) -> Parameters:
  """Returns the parameters of an RMSNorm decoder by part, biases and extra norms included."""
  blocks = sum(
    matrix_entries(config, spec) + vector_entries(config, spec) for spec in config.layer_specs
  )
  head = config.D if config.tied else config.D + config.D * config.V
  return Parameters(embedding=config.V * config.D, blocks=blocks, head=head)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
  """Returns matmul FLOPs of forward and backward per token, for causal rows of `length` tokens.

  A multiply-add counts as 2. Each layer counts 6 times the entries of its matrices and what its
  mixer multiplies between them (`jaxlm.scaling.mixers`), for attention 12 N H P / T, where T is
  `length` and P the pairs of a query and a key it sees: T (T + 1) / 2, less in a layer with a
  window. To that 6 D V is added: the head counts even when tied, the embedding lookup does not; nor
  do norms, softmax, rotary embedding and recomputation.

  Published MFU mostly follows PaLM (arXiv:2204.02311, appendix B), whose attention term
  12 layers N H T counts every key for every query: about twice the causal one, so MFU from this
  count is the lower.
  """
  check(length >= 1, "length", length, "must be at least 1")
  keys_X = np.arange(1, length + 1)
  flops = 6.0 * config.D * config.V
  for spec, layers in Counter(config.layer_specs).items():
    own = 6 * matrix_entries(config, spec) + mixing_flops(spec.mixer, keys_X) / length
    flops += layers * own
  return flops


def train_flops_of_rows(
  config: ModelConfig, positions_BT: np.ndarray, counted_BT: np.ndarray
) -> float:
  """Returns matmul FLOPs of forward and backward on rows, which may be packed.

  Counts as `train_flops_per_token` does, but with the pairs that are attended: a token at position
  p of its segment sees p + 1 keys, or fewer in a layer with a window. `positions_BT` are int, from
  0 in each segment; `counted_BT` is bool, False for padding. Costs one pass over the positions for
  each different layer of the model.
  """
  keys_X = positions_BT[counted_BT] + 1  # X: counted tokens
  flops = 6.0 * config.D * config.V * keys_X.size
  for spec, layers in Counter(config.layer_specs).items():
    own = 6.0 * matrix_entries(config, spec) * keys_X.size + mixing_flops(spec.mixer, keys_X)
    flops += layers * own
  return flops


def matrix_entries(config: ModelConfig, spec: LayerSpec) -> int:
  """Counts the entries of one layer's matrices that multiply every token."""
  return projection_entries(config.D, spec.mixer) + 3 * config.D * spec.feedforward.F


def vector_entries(config: ModelConfig, spec: LayerSpec) -> int:
  """Counts one layer's other parameters: norms, biases and what its mixer has besides."""
  norms = (4 if config.post_norms else 2) * config.D
  biases = (2 * spec.feedforward.F + config.D) * spec.feedforward.bias
  return norms + other_entries(config.D, spec.mixer) + biases
