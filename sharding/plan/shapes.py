"""Records the shapes of a model and of a training step: all that a plan has to know of them."""

# D model, V vocabulary, T positions, N query heads, K key heads, H width of queries and keys,
# U width of values, F feed-forward, E experts

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pallas_kernels.common.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShapes:
  """Counts the weights of one layer and names the widths that are split."""

  attention_weights: int
  """of all its projections"""
  N: int
  K: int
  H: int
  U: int
  mlp_weights: int
  """of what every token passes: dense feed-forward, shared experts, router"""
  F: int
  window: int | None = None
  """keys that a query sees; None: all up to itself"""
  vectors: int = 0
  """entries of norms and biases"""
  E: int = 0
  active: int = 0
  """experts that a token passes"""
  expert_weights: int = 0
  """of one of the E experts"""
  expert_F: int = 0

  @property
  def weights(self) -> int:
    """Returns the number of weights of all matrices."""
    return self.attention_weights + self.mlp_weights + self.E * self.expert_weights

  @property
  def active_weights(self) -> int:
    """Returns the number of weights that a token is multiplied with."""
    return self.attention_weights + self.mlp_weights + self.active * self.expert_weights

  def score_flops(self, T: int) -> float:
    """Returns the forward FLOPs per token of queries with keys and weights with values, causal."""
    seen = min(T, self.window or T)
    pairs = seen * (seen + 1) / 2 + (T - seen) * seen
    return 2 * self.N * (self.H + self.U) * pairs / T

  @property
  def product_width(self) -> int:
    """Returns the numbers per token that products give to heads and gates; `tensor` splits them."""
    heads = self.N * self.H + self.K * (self.H + self.U)
    return heads + 2 * (self.F + self.active * self.expert_F)

  @property
  def inner_width(self) -> int:
    """Returns the same with the outputs of attention and of the gates."""
    return self.product_width + self.N * self.U + self.F + self.active * self.expert_F


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShapes:
  """Describes a decoder as layers between an embedding and a head."""

  name: str
  D: int
  V: int
  layers: tuple[tuple[LayerShapes, int], ...]
  """each kind of layer, and how many there are"""
  tied: bool = False

  @property
  def count(self) -> int:
    """Returns the number of layers."""
    return sum(count for _, count in self.layers)

  @property
  def parameters(self) -> int:
    """Returns the number of weights, vectors included."""
    blocks = sum(count * (layer.weights + layer.vectors) for layer, count in self.layers)
    return blocks + self.D + (1 if self.tied else 2) * self.V * self.D

  @property
  def active_parameters(self) -> int:
    """Returns the number of weights that a token is multiplied with; the head counts, once."""
    return sum(n * layer.active_weights for layer, n in self.layers) + self.V * self.D

  def flops_per_token(self, T: int) -> float:
    """Returns the FLOPs of forward and backward on causal rows, without recomputation."""
    scores = sum(count * layer.score_flops(T) for layer, count in self.layers)
    return 6 * self.active_parameters + 3 * scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """Describes a training step with float32 weights."""

  batch: int
  """rows, over all devices"""
  length: int
  accumulate: int = 1
  """micro-batches"""
  remat: Literal["none", "full", "dots", "names"] = "full"
  """what the backward pass computes again, as in `jaxlm.config.ComputeConfig`"""
  compute_bytes: int = 2
  reduce_bytes: int = 4
  """of a weight gradient that devices sum"""
  state_bytes: float = 8
  """of the optimizer, for each weight, on average"""
  schedule: str = "1f1b"
  """of pipeline stages; a name of `sharding.roofline.SCHEDULES`"""
  chunks: int = 1
  """pipeline stages on one rank"""

  def __post_init__(self) -> None:
    check(self.batch >= 1, "batch", self.batch, "must be at least 1")
    check(self.length >= 1, "length", self.length, "must be at least 1")
    rule = f"must divide batch={self.batch}"
    good = self.accumulate >= 1 and self.batch % self.accumulate == 0
    check(good, "accumulate", self.accumulate, rule)


def deepseek_v3_shapes() -> ModelShapes:
  """Returns the shapes of DeepSeek-V3 alone (arXiv 2412.19437, section 4.2): nothing here runs it.

  Latent attention (queries over 1536, keys and values over 512 numbers, of which 64 more carry
  positions), 3 dense layers, then 58 of 256 experts and a shared one; without the module that
  predicts a second token.
  """
  D, N, H, U, expert_F = 7168, 128, 128 + 64, 128, 2048
  attention = D * 1536 + 1536 * N * H + D * (512 + 64) + 512 * N * (128 + U) + N * U * D
  heads = {"attention_weights": attention, "N": N, "K": N, "H": H, "U": U}
  vectors = 2 * D + 1536 + 512
  expert = 3 * D * expert_F
  dense = LayerShapes(**heads, vectors=vectors, mlp_weights=3 * D * 18432, F=18432)
  mixture = LayerShapes(
    **heads,
    vectors=vectors + 256,
    mlp_weights=expert + 256 * D,
    F=expert_F,
    E=256,
    active=8,
    expert_weights=expert,
    expert_F=expert_F,
  )
  return ModelShapes(name="deepseek_v3_shapes", D=D, V=129280, layers=((dense, 3), (mixture, 58)))


def split_layers(model: ModelShapes, stages: int) -> tuple[tuple[LayerShapes, float], ...]:
  """Returns each kind of layer with its number on the fullest of `stages` pipeline stages."""
  scale = math.ceil(model.count / stages) / model.count
  return tuple((layer, count * scale) for layer, count in model.layers)
