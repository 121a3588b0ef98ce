"""Parameters and training FLOPs of a decoder, counted from its configuration."""

# T positions, D model, N query heads, K key heads, H head width, F feed-forward, V vocabulary

from __future__ import annotations

from typing import NamedTuple

from jaxlm.config import ModelConfig, check


class Parameters(NamedTuple):
  """How many numbers each part learns; laws differ in which parts they call N."""

  embedding: int
  """V D"""
  blocks: int
  """attention, feed-forward and norms of all blocks"""
  head: int
  """final norm, and the output matrix D V unless it is tied to the embedding"""

  @property
  def total(self) -> int:
    return self.embedding + self.blocks + self.head


def parameter_count(config: ModelConfig) -> Parameters:
  """Parameters of an RMSNorm, grouped-query decoder with gated feed-forward, its biases and extra norms included."""
  block = _block_matrices(config) + _block_vectors(config)
  head = config.D if config.tied else config.D + config.D * config.V
  return Parameters(embedding=config.V * config.D, blocks=config.layers * block, head=head)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
  """Matmul FLOPs of forward and backward per token, a multiply-add as 2, for causal rows of `length` tokens.

  6 (layers (2 D N H + 2 D K H + 3 D F) + D V) + sum over layers of 12 N H P / T, where T is `length` and P the pairs of
  a query and a key it sees: T (T + 1) / 2, less in a "window" layer. The head counts even when tied, the embedding
  lookup does not; nor do norms, softmax, rotary embedding and recomputation.

  Published MFU mostly follows PaLM (arXiv:2204.02311, appendix B), whose attention term 12 layers N H T counts every
  key for every query: about twice the causal one, so MFU from this count is the lower.
  """
  check(length >= 1, "length", length, "must be at least 1")
  matrices = config.layers * _block_matrices(config) + config.D * config.V
  kinds = config.attention * (config.layers // len(config.attention))
  pairs = sum(
    _causal_pairs(length, config.window if kind == "window" else length) for kind in kinds
  )
  return 6 * matrices + 12 * config.N * config.H * pairs / length


def _block_matrices(config: ModelConfig) -> int:
  """Entries of one block's matrices: q and o, k and v, gate, up and down."""
  return (
    2 * config.D * config.N * config.H
    + 2 * config.D * config.K * config.H
    + 3 * config.D * config.F
  )


def _block_vectors(config: ModelConfig) -> int:
  """Entries of one block's norms and biases."""
  norms = (4 if config.post_norms else 2) * config.D + (2 * config.H if config.qk_norm else 0)
  attention = (config.N + 2 * config.K) * config.H * config.qkv_bias + config.D * config.out_bias
  return norms + attention + (2 * config.F + config.D) * config.mlp_bias


def _causal_pairs(length: int, window: int) -> int:
  """Pairs of a query and one of the last `window` keys up to itself, over a row of `length` tokens."""
  ramp = min(length, window)
  return ramp * (ramp + 1) // 2 + (length - ramp) * window
