"""Builds one layer: a mixer and a feed-forward, each added to the residual stream."""

# B batch, T positions, D model

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ComputeConfig, LayerSpec, ModelConfig
from jaxlm.models.feedforward import FEEDFORWARDS
from jaxlm.models.linear import Roles, declare_parts
from jaxlm.models.mixers import MIXERS
from jaxlm.models.mixers.context import Context
from jaxlm.models.norms import RMSNorm


class Block(nn.Module):
  """Adds a mixer and a feed-forward: x += mixer(norm(x)); x += feedforward(norm(x)).

  Under `post_norms` both outputs are normed again before they are added.
  """

  spec: LayerSpec
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]
  """the layers of the model that this block computes, one after the other"""

  def setup(self) -> None:
    """Makes the norms, the mixer and the feed-forward."""
    c, spec = self.config, self.spec
    shared = (c, self.compute, self.layers)
    self.mixer_norm = RMSNorm(c.D, c.norm_eps, c.norm_offset)
    self.mixer = MIXERS[type(spec.mixer)](spec.mixer, *shared)
    self.feedforward_norm = RMSNorm(c.D, c.norm_eps, c.norm_offset)
    self.feedforward = FEEDFORWARDS[type(spec.feedforward)](spec.feedforward, *shared)
    if c.post_norms:
      self.mixer_post_norm = RMSNorm(c.D, c.norm_eps, c.norm_offset)
      self.feedforward_post_norm = RMSNorm(c.D, c.norm_eps, c.norm_offset)

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    post_norms = ("mixer_post_norm", "feedforward_post_norm") if self.config.post_norms else ()
    parts = ("mixer_norm", "mixer", "feedforward_norm", "feedforward")
    return declare_parts(self, *parts, *post_norms)

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: Any = None
  ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Returns x [B, T, D], this layer's updated cache or None, and the statistics of its parts."""
    mixed_BTD, cache, mixer_statistics = self.mixer(self.mixer_norm(x_BTD), context, cache)
    if self.config.post_norms:
      mixed_BTD = self.mixer_post_norm(mixed_BTD)
    x_BTD = checkpoint_name(x_BTD + mixed_BTD, "feedforward_in")
    fed_BTD, statistics = self.feedforward(self.feedforward_norm(x_BTD))
    if self.config.post_norms:
      fed_BTD = self.feedforward_post_norm(fed_BTD)
    return x_BTD + fed_BTD, cache, mixer_statistics | statistics
