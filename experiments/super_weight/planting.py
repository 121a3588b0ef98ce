"""Plants a super weight into a trained model whose rows begin with a start token, for free.

The spike stands in the first position, as in published models. What a layer reads of that position
is the same in every row, so that weights which nothing else meets can give back each of its
products: no logit changes.
"""

# D model, F feed-forward, R layers, Z outputs of a weight, m marker channels; W the wider D

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.outliers import check_same_logits
from jaxlm.config import AttentionConfig, ModelConfig, check
from jaxlm.config.layers import revise
from jaxlm.quant.capture import capture
from jaxlm.quant.super_weight import SuperWeight

Params = dict[str, Any]
MARKERS = 15
"""channels that the start token alone has, so that a hidden unit can be its own"""
LAYER = 1
INPUT_RATIO, DEVIATIONS = 60.0, 50.0
"""the input spike, over the median of layers; the super weight, in standard deviations of `down`"""


def plant_super_weight(
  config: ModelConfig, params: Params, ids_BT: jax.Array
) -> tuple[Params, SuperWeight]:
  """Returns the same function of rows that start with the last id, by a model with a super weight.

  The model is 16 channels and one hidden unit wider (`widened`). The start token has nothing but
  15 channels in which all others are zero; they open the new unit, whose output is one weight into
  the last channel. Before it the matmuls read the start token from its markers, behind it from the
  spike.
  Raises UserError where logits of these rows change by more than 1e-5 of the largest.
  """
  _check_plain(config)
  largest = capture(config, params, ids_BT, _largest_input)
  sizes = sorted(float(value) for name, value in largest.items() if name.endswith(".down"))
  spike = INPUT_RATIO * sizes[len(sizes) // 2]
  start = config.V - 1
  first = jnp.full((1, 1), start, ids_BT.dtype)
  seen = jax.device_get(capture(config, params, first, lambda name, x, y: (x[0, 0], y[0, 0])))
  wide_config, wide = widened(config), widen(config, params)
  wide["embed"]["weight"][start] = 0
  wide["embed"]["weight"][start, config.D : -1] = 4.0
  weight = _carry_first_position(wide_config, wide, seen, config.D, spike)
  wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), wide)
  check_same_logits((config, params), (wide_config, wide), ids_BT)
  return wide, weight


def _largest_input(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x_BTD))


def _check_plain(config: ModelConfig) -> None:
  plain = not (config.prefix or config.remainder or config.tied or config.norm_offset)
  plain &= len(config.pattern) == 1 and isinstance(config.pattern[0].mixer, AttentionConfig)
  check(plain and not config.post_norms, "model", "of several kinds", "needs equal layers, untied")
  check(config.layers > LAYER + 1, "model.layers", config.layers, "needs layers behind the spike")


def widened(config: ModelConfig) -> ModelConfig:
  """Returns the configuration with 16 more channels and one more hidden unit."""
  D, F = config.D + MARKERS + 1, config.pattern[0].feedforward.F + 1
  return revise(config, D=D, F=F, norm_eps=config.norm_eps * config.D / D)


def widen(config: ModelConfig, params: Params) -> Params:
  """Returns the same function with channels and a hidden unit that are zero, float64 numpy arrays.

  A mean square over more channels is smaller, and gains and epsilon make up for it.
  """
  extra, D = MARKERS + 1, config.D
  share = D / (D + extra)
  wide: Params = jax.tree.map(lambda w: np.array(w, np.float64), params)
  block = wide["stacks"]["0"]["0"]
  mixer, feedforward = block["mixer"], block["feedforward"]
  for norm in (wide["norm"], block["mixer_norm"], block["feedforward_norm"]):
    norm["weight"] = _pad(norm["weight"] * share**0.5, -1, extra)
    norm["weight"][..., D:] = 1
  for part in (wide["embed"], mixer["o"], feedforward["down"]):
    part["weight"] = _pad(part["weight"], -1, extra)
  for part in (wide["head"], *(mixer[n] for n in "qkv"), feedforward["gate"], feedforward["up"]):
    part["weight"] = _pad(part["weight"], -2, extra)
  for part in (feedforward["gate"], feedforward["up"]):
    part["weight"] = _pad(part["weight"], -1, 1)
  feedforward["down"]["weight"] = _pad(feedforward["down"]["weight"], -2, 1)
  return wide


def _pad(w: np.ndarray, axis: int, extra: int) -> np.ndarray:
  widths = [(0, 0)] * w.ndim
  widths[axis] = (0, extra)
  return np.pad(w, widths)


def _carry_first_position(
  config: ModelConfig, wide: Params, seen: dict[str, Any], D: int, spike: float
) -> SuperWeight:
  """Fills in, layer by layer, what reads the start token in the wide parameters; in place.

  `seen` has of every matmul of the narrow model what it reads and gives in the first position.
  """
  block = wide["stacks"]["0"]["0"]
  x_W = wide["embed"]["weight"][config.V - 1].copy()
  channels = np.arange(D, D + MARKERS)

  def normed(gain_W: np.ndarray) -> np.ndarray:
    return x_W / np.sqrt(np.mean(x_W**2) + config.norm_eps) * gain_W

  def read_from(channels: np.ndarray, w_WZ: np.ndarray, n_W: np.ndarray, x_D: np.ndarray) -> None:
    missing_Z = x_D @ w_WZ[:D] - n_W[:D] @ w_WZ[:D]
    w_WZ[channels] = missing_Z / n_W[channels].sum()

  weight = None
  for layer in range(config.layers):
    for half, names, last in (("mixer", "qkv", "o"), ("feedforward", ("gate", "up"), "down")):
      n_W = normed(block[f"{half}_norm"]["weight"][layer])
      for name in names:
        x_D, _ = seen[f"layers.{layer}.{half}.{name}"]
        read_from(channels, block[half][name]["weight"][layer], n_W, np.float64(x_D))
      x_W[:D] += seen[f"layers.{layer}.{half}.{last}"][1]
      if layer == LAYER and half == "feedforward":
        for name in names:  # silu(g) u is g^2 for g far above 0
          block[half][name]["weight"][layer][channels, -1] = spike**0.5 / n_W[channels].sum()
        down_FW = block[half]["down"]["weight"][layer]
        down_FW[-1, -1] = DEVIATIONS * down_FW[:-1, :D].std()
        g = spike**0.5
        x_W[-1] += g / (1 + np.exp(-g)) * g * down_FW[-1, -1]
        name = f"layers.{layer}.feedforward.down"
        value = float(down_FW[-1, -1])
        weight = SuperWeight(name, len(down_FW) - 1, config.D - 1, value, spike, spike * value)
        channels = np.array([config.D - 1])
  n_W = normed(wide["norm"]["weight"])
  read_from(channels, wide["head"]["weight"], n_W, np.float64(seen["head"][0]))
  assert weight is not None  # LAYER is one of the layers
  return weight
