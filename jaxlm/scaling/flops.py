"""Counts parameters and training FLOPs of a decoder from its configuration."""

# B rows, T positions, D model, N query heads, K key heads, H head width, F feed-forward,
# V vocabulary

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxlm.config import AttentionConfig, LayerSpec, ModelConfig, check


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

  A multiply-add counts as 2. The sum over layers of 6 (2 D N H + 2 D K H + 3 D F) + 12 N H P / T,
  plus 6 D V, where T is `length` and P the pairs of a query and a key it sees: T (T + 1) / 2, less
  in a layer with a window. The head counts even when tied, the embedding lookup does not; nor do
  norms, softmax, rotary embedding and recomputation.

  Published MFU mostly follows PaLM (arXiv:2204.02311, appendix B), whose attention term
  12 layers N H T counts every key for every query: about twice the causal one, so MFU from this
  count is the lower.
  """
  check(length >= 1, "length", length, "must be at least 1")
  layers = sum(
    6 * matrix_entries(config, spec) + _attention_flops(spec.mixer, length)
    for spec in config.layer_specs
  )
  return layers + 6 * config.D * config.V


def train_flops_of_rows(
  config: ModelConfig, positions_BT: np.ndarray, counted_BT: np.ndarray
) -> float:
  """Returns matmul FLOPs of forward and backward on rows, which may be packed.

  Counts as `train_flops_per_token` does, but with the pairs that are attended: a token at position
  p of its segment sees p + 1 keys, or fewer in a layer with a window. `positions_BT` are int, from
  0 in each segment; `counted_BT` is bool, False for padding. Costs one pass over the positions for
  each different window of the model.
  """
  keys_X = positions_BT[counted_BT] + 1  # X: counted tokens
  windows = {spec.mixer.window for spec in config.layer_specs}
  limits = {window: keys_X if window is None else np.minimum(keys_X, window) for window in windows}
  pairs = {window: int(seen_X.sum(dtype=np.int64)) for window, seen_X in limits.items()}
  flops = 6.0 * config.D * config.V * keys_X.size
  for spec in config.layer_specs:
    mixer = spec.mixer
    flops += 6.0 * matrix_entries(config, spec) * keys_X.size
    flops += 12.0 * mixer.N * mixer.H * pairs[mixer.window]
  return flops


def _attention_flops(mixer: AttentionConfig, length: int) -> float:
  """Returns FLOPs per token of the products of queries with keys and of weights with values."""
  pairs = _causal_pairs(length, mixer.window or length)
  return 12 * mixer.N * mixer.H * pairs / length


def matrix_entries(config: ModelConfig, spec: LayerSpec) -> int:
  """Counts one layer's matrices: q and o, k and v, gate, up and down."""
  mixer = spec.mixer
  heads = 2 * config.D * mixer.N * mixer.H + 2 * config.D * mixer.K * mixer.H
  return heads + 3 * config.D * spec.feedforward.F


def vector_entries(config: ModelConfig, spec: LayerSpec) -> int:
  """Counts one layer's norms and biases."""
  mixer, F = spec.mixer, spec.feedforward.F
  norms = (4 if config.post_norms else 2) * config.D + (2 * mixer.H if mixer.qk_norm else 0)
  attention = (mixer.N + 2 * mixer.K) * mixer.H * mixer.qkv_bias + config.D * mixer.out_bias
  return norms + attention + (2 * F + config.D) * spec.feedforward.bias


def _causal_pairs(length: int, window: int) -> int:
  """Counts pairs of a query and one of the last `window` keys up to itself, in a whole row."""
  ramp = min(length, window)
  return ramp * (ramp + 1) // 2 + (length - ramp) * window
