"""Finds the few weights without which a model fails, and keeps them when the rest is quantised.

Yu et al. 2024 (The Super Weight in Large Language Models, arXiv 2411.07191): one entry of an early
`down` makes a spike of activations. One forward pass over any text shows it.
"""

# B batch, T positions, D model, F feed-forward, R repeats of one stack

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.config.formats import UniformFormat
from jaxlm.models.parts import Matmul, list_matmuls
from jaxlm.quant import uniform
from jaxlm.quant.capture import capture

Params = dict[str, Any]


class SuperWeight(NamedTuple):
  """Names one entry of a `down`, and the spikes that showed it."""

  name: str
  """of the matmul, as in "layers.2.feedforward.down\""""
  row: int
  """input channel, of F"""
  column: int
  """output channel, of D"""
  value: float
  input_spike: float
  output_spike: float


def find_super_weights(
  config: ModelConfig, params: Params, ids_BT: jax.Array, *, ratio: float = 20.0, most: int = 6
) -> list[SuperWeight]:
  """Returns super weights in the order in which they are found, at most `most`.

  In the first layer whose `down` has both an input and an output beyond `ratio` times the median
  over layers, it is the weight between the two channels. It is zeroed and the search repeated.
  """
  found: list[SuperWeight] = []
  while len(found) < most:
    spikes = _spikes(config, params, ids_BT)
    middle_in = _median([abs(s.input_spike) for s in spikes])
    middle_out = _median([abs(s.output_spike) for s in spikes])
    both = [
      s
      for s in spikes
      if abs(s.input_spike) > ratio * middle_in and abs(s.output_spike) > ratio * middle_out
    ]
    if not both:
      return found
    first = both[0]
    value = float(_entries(config, params, first.name)[first.row, first.column])
    found.append(first._replace(value=value))
    params = scale_weights(config, params, found[-1:], 0.0)
  return found


def _spikes(config: ModelConfig, params: Params, ids_BT: jax.Array) -> list[SuperWeight]:
  """Returns of every `down` its largest input and output, with their channels, in layer order."""
  spikes = []
  for name, value in jax.device_get(_read_downs(config, params, ids_BT)).items():
    if value is not None:
      (row, input_spike), (column, output_spike) = value
      entry = SuperWeight(name, int(row), int(column), 0.0, float(input_spike), float(output_spike))
      spikes.append(entry)
  return sorted(spikes, key=lambda s: int(s.name.split(".")[1]))


@functools.partial(jax.jit, static_argnums=0)  # one program for all searches in a model
def _read_downs(config: ModelConfig, params: Params, ids_BT: jax.Array) -> dict[str, Any]:
  def read(name: str, x_BTF: jax.Array, y_BTD: jax.Array) -> Any:
    if not name.endswith("feedforward.down"):
      return None
    return [_largest(array) for array in (x_BTF, y_BTD)]

  return capture(config, params, ids_BT, read)


def _largest(x_BTZ: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the channel and the value of the largest magnitude."""
  flat = x_BTZ.reshape(-1, x_BTZ.shape[-1])
  place = jnp.argmax(jnp.abs(flat))
  return place % flat.shape[1], flat.reshape(-1)[place]


def _median(values: list[float]) -> float:
  return float(jnp.median(jnp.array(values)))


def scale_weights(
  config: ModelConfig, params: Params, weights: list[SuperWeight], factor: float
) -> Params:
  """Returns the parameters with these entries times a factor: 0 ablates, 1.2 to 2 amplifies."""
  return _with_entries(config, params, weights, [w.value * factor for w in weights])


def _with_entries(
  config: ModelConfig, params: Params, weights: list[SuperWeight], values: list[float]
) -> Params:
  """Returns the parameters with these values in the places of the weights."""
  params = jax.tree.map(lambda w: w, params)
  for weight, value in zip(weights, values, strict=True):
    matmul, repeat = _locate(config, weight.name)
    part = params
    for name in matmul.path:
      part = part[name]
    part["weight"] = part["weight"].at[repeat, weight.row, weight.column].set(value)
  return params


def _locate(config: ModelConfig, name: str) -> tuple[Matmul, int]:
  """Returns the matmul of this name, and its place in its stack."""
  for matmul in list_matmuls(config):
    if name in matmul.names:
      return matmul, matmul.names.index(name)
  raise KeyError(name)


def _entries(config: ModelConfig, params: Params, name: str) -> jax.Array:
  matmul, repeat = _locate(config, name)
  part: Any = params
  for key in matmul.path:
    part = part[key]
  return part["weight"][repeat]


def quantize_around(
  config: ModelConfig,
  params: Params,
  weights: list[SuperWeight],
  format: UniformFormat,
  *,
  z: float = 9.0,
) -> Params:
  """Returns float weights that are rounded, but for the super weights, which stay as they are.

  Weights of the layers' matmuls are first clipped to z standard deviations plus the mean magnitude
  (section 4.2), so that one outlier does not widen the grid of its block.
  """
  params = jax.tree.map(lambda w: w, params)
  for matmul in list_matmuls(config):
    if matmul.path[0] == "stacks":
      part = params
      for name in matmul.path:
        part = part[name]
      round_one = lambda w_DF: uniform.quantize(clip_outliers(w_DF, z).T, format).T  # noqa: E731
      part["weight"] = jax.vmap(round_one)(part["weight"])
  return _with_entries(config, params, weights, [w.value for w in weights])


def clip_outliers(w: jax.Array, z: float) -> jax.Array:
  """Returns w within z standard deviations (unbiased) of |w| plus the mean of |w|."""
  size = jnp.abs(w)
  bound = z * jnp.std(size, ddof=1) + jnp.mean(size)
  return jnp.clip(w, -bound, bound)


def quantize_activations_around(
  x_ZD: jax.Array, format: UniformFormat, place: tuple[int, ...]
) -> jax.Array:
  """Returns rounded activations; the entry at `place` counts as the median and then comes back.

  Section 4.1: the super activation is removed, the rest rounded, and the activation restored.
  """
  spike = x_ZD[place]
  rounded = uniform.quantize(x_ZD.at[place].set(jnp.median(x_ZD)), format)
  return rounded.at[place].set(spike)


def plant(
  config: ModelConfig, params: Params, layer: int, row: int, column: int, value: float
) -> Params:
  """Returns the parameters with one entry of a layer's `down` replaced, for tests and studies."""
  name = f"layers.{layer}.feedforward.down"
  return _with_entries(config, params, [SuperWeight(name, row, column, value, 0, 0)], [value])
