"""Starts the scales that formats learn: from the weights, and from the inputs of a first batch."""

# D input width, F output width, R layers that one module computes

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ModelConfig
from jaxlm.config.formats import Format
from jaxlm.config.quant import find_spec
from jaxlm.models.parts import Matmul, list_matmuls
from jaxlm.quant.apply import init_scales, learned_names, turn, unit_normal
from jaxlm.quant.capture import capture


def learned_scales(config: ModelConfig) -> dict[str, Format]:
  """Returns the format of each scale that the rules learn, by the path of its parameter."""
  return {
    ".".join((*matmul.path, f"{operand}_{name}")): format
    for matmul in list_matmuls(config)
    for operand in ("weight", "activation")
    if (format := _learned_format(config, matmul, operand)) is not None
    for name in learned_names(format)
  }


def start_scales(
  config: ModelConfig,
  params: Any,
  ids_BT: jax.Array | None = None,
  compute: ComputeConfig | None = None,
) -> Any:
  """Returns the parameters with all scales that the rules learn, at their first values.

  Those of weights follow from the weights, those of inputs from a forward pass over `ids_BT` by the
  model without rules, or without one from normal values. Scales that are there are replaced.
  """
  inputs: dict[str, dict[str, jax.Array]] = {}
  if ids_BT is not None:
    plain = dataclasses.replace(config, quant=())
    formats = {
      name: format
      for matmul in list_matmuls(config)
      if (format := _learned_format(config, matmul, "activation")) is not None
      for name in matmul.names
    }

    def read(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> dict[str, jax.Array]:
      if name not in formats:
        return {}
      return init_scales(turn(x_BTD, find_spec(config.quant, name).hadamard), formats[name])

    inputs = capture(plain, params, ids_BT, read, compute)
  params = jax.tree.map(lambda w: w, params)  # new dicts, the same arrays
  for matmul in list_matmuls(config):
    part = params
    for name in matmul.path:
      part = part[name]
    for operand in ("weight", "activation"):
      format = _learned_format(config, matmul, operand)
      if format is not None:
        n = max(find_spec(config.quant, name).hadamard for name in matmul.names)
        part |= _start(matmul, operand, format, turn(part["weight"], n, axis=-2), inputs)
  return params


def _start(
  matmul: Matmul,
  operand: str,
  format: Format,
  weight: jax.Array,
  inputs: dict[str, dict[str, jax.Array]],
) -> dict[str, jax.Array]:
  """Returns the scales of one operand of a matmul, stacked like its weight."""
  stacked = matmul.path[0] == "stacks"

  def of_weight(w_DF: jax.Array) -> dict[str, jax.Array]:
    return init_scales(w_DF.T, format)

  if operand == "weight":
    scales = jax.vmap(of_weight)(weight) if stacked else of_weight(weight)
  else:
    rows = [inputs.get(name) or init_scales(unit_normal(), format) for name in matmul.names]
    scales = jax.tree.map(lambda *values: jnp.stack(values), *rows)
    scales = scales if stacked else jax.tree.map(lambda value: value[0], scales)
  return {f"{operand}_{name}": value for name, value in scales.items()}


def _learned_format(config: ModelConfig, matmul: Matmul, operand: str) -> Format | None:
  """Returns the format whose scales a matmul's parameters have for this operand, if any."""
  for name in matmul.names:
    spec = find_spec(config.quant, name)
    format = getattr(spec, operand)
    if learned_names(format) and not (spec.packed and operand == "weight"):
      return format
  return None
