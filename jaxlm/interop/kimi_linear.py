"""Reads the delta attention layers of a Kimi Linear checkpoint (arXiv 2510.26692).

Whole models have latent attention and experts besides, which no configuration here describes yet:
`huggingface.load` refuses them.
"""

# D model, N heads, H head width, R width of the bottlenecks, W taps, Z = N H

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import KdaConfig
from jaxlm.interop.fields import Fields
from jaxlm.interop.hub_folder import CONFIG, MAX_CONFIG_BYTES, local_folder
from jaxlm.interop.safetensors import MappedFile
from jaxlm.interop.strict_json import read_object
from jaxlm.interop.weight_files import find_tensors
from pallas_kernels.common.errors import UserError

MODEL_TYPE = "kimi_linear"


def load_delta_attention(path: str | Path, layer: int) -> tuple[KdaConfig, dict[str, Any]]:
  """Returns the configuration of a delta attention layer, counted from 0, and its parameters.

  They are those of `jaxlm.models.mixers.kda.Kda`, float32. Raises UserError, naming file, field or
  tensor and rule, for another architecture, for a layer that is of another kind, and for tensors
  that are missing or of another shape than config.json says.
  """
  folder = local_folder(path)
  config, D = _read_config(folder / CONFIG, layer)
  tensors = find_tensors(folder)
  params: dict[str, Any] = {}
  for name, (tensor, shape) in _tensors(config, D).items():
    full_name = f"model.layers.{layer}.self_attn.{tensor}"
    if full_name not in tensors:
      raise UserError(f"{folder}: tensor {full_name!r} is missing")
    entry = tensors[full_name]
    if entry.shape != shape:
      raise UserError(f"{entry.file}: {full_name!r} of shape {entry.shape} must be {shape}")
    values = np.asarray(MappedFile(entry.file).view(entry), np.float32)
    module, _, parameter = name.rpartition("/")
    group = params.setdefault(module, {}) if module else params
    group[parameter] = jnp.asarray(_to_ours(parameter, values))
  return config, params


def _read_config(path: Path, layer: int) -> tuple[KdaConfig, int]:
  """Returns the configuration of the layer and the width of the model.

  Takes the fields of published files (`linear_attn_config`, whose layers count from 1) and those
  that transformers 5 writes.
  """
  values = read_object(path, MAX_CONFIG_BYTES)
  fields = Fields(values, str(path))
  if (name := fields.read("model_type", str)) != MODEL_TYPE:
    raise fields.error("model_type", name, f"must be {MODEL_TYPE}")
  layers = fields.read("num_hidden_layers", int)
  if not 0 <= layer < layers:
    raise UserError(f"layer={layer}: {path} has {layers} layers, counted from 0")
  if "linear_attn_config" in values:
    nested = Fields(fields.read("linear_attn_config", dict), str(path), "linear_attn_config.")
    kinds = nested.read("kda_layers", list)
    is_delta, listed = layer + 1 in kinds, f"linear_attn_config.kda_layers={kinds}"
    N, H = nested.read("num_heads", int), nested.read("head_dim", int)
    taps = nested.read("short_conv_kernel_size", int)
  else:
    kinds = fields.read("layer_types", list)
    is_delta, listed = kinds[layer] == "linear_attention", f"layer_types={kinds}"
    N, H = fields.read("linear_num_heads", int), fields.read("linear_head_dim", int)
    taps = fields.read("linear_conv_kernel_dim", int)
  if not is_delta:
    raise UserError(f"{path}: {listed}: layer {layer}, counted from 0, is no delta attention")
  return KdaConfig(N=N, K=N, H=H, conv=taps), fields.read("hidden_size", int)


def _tensors(c: KdaConfig, D: int) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Maps the path of each parameter to the name of its tensor in the layer and the shape there."""
  Z, R = c.N * c.H, c.bottleneck
  matrices = {
    **{name: (f"{name}_proj", (Z, D)) for name in "qkv"},
    "o": ("o_proj", (D, Z)),
    "beta": ("b_proj", (c.N, D)),
    "decay_down": ("f_a_proj", (R, D)),
    "decay_up": ("f_b_proj", (Z, R)),
    "gate_down": ("g_a_proj", (R, D)),
    "gate_up": ("g_b_proj", (Z, R)),
    "o_norm": ("o_norm", (c.H,)),
  }
  return {
    **{f"{module}/weight": (f"{name}.weight", shape) for module, (name, shape) in matrices.items()},
    **{f"{name}_conv": (f"{name}_conv1d.weight", (Z, 1, c.conv)) for name in "qkv"},
    "A_log": ("A_log", (1, 1, c.N, 1)),
    "dt_bias": ("dt_bias", (Z,)),
  }


def _to_ours(parameter: str, values: np.ndarray) -> np.ndarray | jax.Array:
  """Returns a tensor as it is here: matrices and taps transposed, rates by head."""
  if parameter.endswith("_conv"):
    return values[:, 0].T
  return values.reshape(-1) if parameter == "A_log" else values.T
