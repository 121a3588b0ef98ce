"""Computes a gated short convolution (Poli et al. 2023, arXiv 2302.10866; BaseConv of 2312.04927).

Multiplies a causal convolution over a few tokens by a gate, channel by channel.
"""

# B batch, T positions, D model, Z channels, W taps, P = W - 1 inputs before the first position

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ConvConfig, ModelConfig
from jaxlm.models.convolution import short_convolution
from jaxlm.models.linear import Linear, Roles, declare_parts, sharded_normal
from jaxlm.models.mixers.context import Context
from jaxlm.models.mixers.shards import check_whole_rows, run_on_rows_and_heads
from jaxlm.models.mixers.steps import bring_back, bring_to_front, join, last_inputs, order_steps
from sharding.rules import all_gather, shard


class ConvCache(NamedTuple):
  """Holds the last inputs of one layer's convolution."""

  seen_B: jax.Array
  """int32, the position that comes next"""
  inputs_BPZ: jax.Array


class Conv(nn.Module):
  """Computes o(conv(x v) * silu(x gate)), with as many channels as the model is wide."""

  spec: ConvConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    """Makes the projections and the taps."""
    D, W = self.config.D, self.spec.taps
    linear: Callable[..., Linear] = functools.partial(
      Linear, compute=self.compute, rules=self.config.quant, layers=self.layers
    )
    inner, outer = ("batch", "length", "act_heads"), ("batch", "norm_length", None)
    self.v = linear((D, D), D**-0.5, ("embed", "heads"), inner)
    self.gate = linear((D, D), D**-0.5, ("embed", "heads"), inner)
    out_std = (D * 2 * self.config.layers) ** -0.5
    self.o = linear((D, D), out_std, ("heads", "embed"), outer)
    self.taps = self.param("taps", sharded_normal, (W, D), W**-0.5, None, "heads")

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return declare_parts(self, "v", "gate", "o") | {"taps": "taps"}

  @staticmethod
  def init_cache(
    spec: ConvConfig,
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str,
    layers: Sequence[int],
  ) -> ConvCache:
    """Returns an empty cache of any of `layers`, which is as large for any `length`."""
    inputs_BPZ = jnp.zeros((batch, spec.taps - 1, config.D), dtype)
    seen_B = shard(jnp.zeros(batch, jnp.int32), "batch")
    return ConvCache(seen_B, shard(inputs_BPZ, "batch", None, "act_heads"))

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: ConvCache | None = None
  ) -> tuple[jax.Array, ConvCache | None, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D], its updated cache or None, and no statistics."""
    check_whole_rows("ConvConfig", context.in_order, cache is not None)
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    arrays: dict[str, Any] = {"x_BTZ": self.v(x_BTD), "gate_BTZ": self.gate(x_BTD)}
    arrays["taps_WZ"] = self.taps
    if cache is None:
      arrays["segment_ids_BT"] = context.segment_ids_BT
      return self.o(run_on_rows_and_heads(_convolve, arrays, ("y_BTZ",))["y_BTZ"]), None, {}
    arrays |= {"positions_BT": context.positions_BT, **cache._asdict()}
    outs = run_on_rows_and_heads(_convolve_cached, arrays, ("y_BTZ", *cache._fields))
    return self.o(outs.pop("y_BTZ")), ConvCache(**outs), {}


def _convolve(
  x_BTZ: jax.Array,
  gate_BTZ: jax.Array,
  taps_WZ: jax.Array,
  segment_ids_BT: jax.Array | None = None,
  before_BPZ: jax.Array | None = None,
) -> dict[str, jax.Array]:
  y_BTZ = short_convolution(x_BTZ, taps_WZ, segment_ids_BT, before_BPZ).astype(x_BTZ.dtype)
  return {"y_BTZ": y_BTZ * jax.nn.silu(gate_BTZ)}


def _convolve_cached(
  x_BTZ: jax.Array,
  gate_BTZ: jax.Array,
  taps_WZ: jax.Array,
  positions_BT: jax.Array,
  seen_B: jax.Array,
  inputs_BPZ: jax.Array,
) -> dict[str, jax.Array]:
  steps = order_steps(positions_BT, seen_B)
  x_BTZ, gate_BTZ = bring_to_front(x_BTZ, steps), bring_to_front(gate_BTZ, steps)
  y_BTZ = _convolve(x_BTZ, gate_BTZ, taps_WZ, before_BPZ=inputs_BPZ)["y_BTZ"]
  return {
    "y_BTZ": bring_back(y_BTZ, steps),
    "seen_B": steps.seen_B,
    "inputs_BPZ": last_inputs(join(inputs_BPZ, x_BTZ), steps),
  }
