"""Gives a trained model the outlier channels of a large one, without changing what it computes."""

# D model, F feed-forward, K key heads, N query heads, H head width, Z any axis that a weight reads

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import AttentionConfig, ModelConfig, check
from jaxlm.data.loader import train_loader
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer
from jaxlm.quant.capture import capture
from jaxlm.quant.rotation import fold_norms, rotate_residual
from jaxlm.run.text import TextTask
from pallas_kernels.common.errors import UnsupportedError

Params = dict[str, Any]
FACTOR = 32.0
"""a power of two, so that scaling by it and back is exact"""
SPACING = 32
"""of the inputs of `down` that stand out"""
_CALIBRATION = 1000
"""seed of the order of the training text in which calibration rows come"""
TOLERANCE = 1e-5
"""by which logits may differ when outliers are planted, of the largest one"""


def plant_outliers(
  config: ModelConfig, params: Params, ids_BT: jax.Array, factor: float = FACTOR
) -> tuple[ModelConfig, Params]:
  """Returns the same function with channels that stand out wherever a rotation could spread them.

  Gains of norms are folded, and the residual stream is turned to the principal axes of what matmuls
  read of it on these rows, so that few of its channels hold most of it. A channel of every head's
  values, a rotary pair of every head's keys, and one in 32 inputs of `down` become `factor` times
  as large; the weights that they meet become as much smaller. Raises UserError where logits of
  these rows change by more than 1e-5 of the largest.
  """
  folded_config, folded = fold_norms(config, params)
  turned = rotate_residual(folded_config, folded, principal_axes(folded_config, folded, ids_BT))
  planted = scale_channels(folded_config, turned, factor)
  check_same_logits((config, params), (folded_config, planted), ids_BT)
  return folded_config, planted


def calibration_batches(task: TextTask, count: int, rows: Any) -> list[Batch]:
  """Returns batches of training text, the same for models of all seeds."""
  batches = train_loader(task.text, batch=task.config.batch, seed=_CALIBRATION, rows=rows)
  return [next(batches) for _ in range(count)]


def principal_axes(config: ModelConfig, params: Params, ids_BT: jax.Array) -> jax.Array:
  """Returns the eigenvectors [D, D] of the second moment of normed residuals, largest first."""

  def read(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> jax.Array | None:
    if name != "head" and not name.endswith((".q", ".gate")):
      return None
    return jnp.einsum("btd,bte->de", x_BTD, x_BTD, precision="highest")

  moments = [
    m for m in jax.device_get(capture(config, params, ids_BT, read)).values() if m is not None
  ]
  _, axes_DD = np.linalg.eigh(np.sum(moments, axis=0, dtype=np.float64))
  return jnp.asarray(axes_DD[:, ::-1], jnp.float32)


def scale_channels(config: ModelConfig, params: Params, factor: float) -> Params:
  """Returns the parameters with some channels of values, keys and inputs of `down` made larger."""
  params = jax.tree.map(lambda w: w, params)
  specs = [spec for specs, _ in config.stacks for spec in specs]
  blocks = [block for stack in params["stacks"].values() for block in stack.values()]
  for spec, block in zip(specs, blocks, strict=True):
    c, mixer, feedforward = spec.mixer, block["mixer"], block["feedforward"]
    if not isinstance(c, AttentionConfig) or c.qk_norm:
      raise UnsupportedError("model: outliers are planted in attention without norms of its heads")
    value_H, key_H, inner_F = np.ones(c.H), np.ones(c.H), np.ones(spec.feedforward.F)
    value_H[0] = key_H[c.H // 2 - 1] = key_H[c.H - 1] = factor
    inner_F[::SPACING] = factor
    _scale_outputs(mixer["v"], np.tile(value_H, c.K))
    _scale_inputs(mixer["o"], 1 / np.tile(value_H, c.N))
    _scale_outputs(mixer["k"], np.tile(key_H, c.K))
    _scale_outputs(mixer["q"], 1 / np.tile(key_H, c.N))
    _scale_outputs(feedforward["up"], inner_F)
    _scale_inputs(feedforward["down"], 1 / inner_F)
  return params


def _scale_outputs(linear: Params, factor_Z: np.ndarray) -> None:
  for name, w in linear.items():  # weight [R, D, Z], bias [R, Z]
    linear[name] = w * jnp.asarray(factor_Z, jnp.float32).reshape((1,) * (w.ndim - 1) + (-1,))


def _scale_inputs(linear: Params, factor_Z: np.ndarray) -> None:
  linear["weight"] = linear["weight"] * jnp.asarray(factor_Z, jnp.float32)[None, :, None]


def check_same_logits(
  first: tuple[ModelConfig, Params],
  second: tuple[ModelConfig, Params],
  ids_BT: jax.Array,
  tolerance: float = TOLERANCE,
) -> float:
  """Returns by how much two models' float32 logits differ, in units of the largest one.

  Raises UserError where it is more than the tolerance.
  """
  before_BTV, after_BTV = (np.asarray(_logits(*model, ids_BT)) for model in (first, second))
  change = float(np.abs(after_BTV - before_BTV).max() / np.abs(before_BTV).max())
  rule = f"must be at most {tolerance:g} of the largest logit: the two models differ"
  check(change <= tolerance, "change of logits", f"{change:.1e}", rule)
  return change


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Params, ids_BT: jax.Array) -> jax.Array:
  with jax.default_matmul_precision("highest"):
    return Transformer(dataclasses.replace(config, quant=())).apply(params, ids_BT)
