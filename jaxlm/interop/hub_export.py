"""Writes config.json in the layout of transformers 4, which 5 reads too."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig, RopeConfig
from jaxlm.interop.hub_config import (
  ACTIVATIONS,
  FAMILIES,
  KINDS,
  Family,
  parse_config,
  shortest_pattern,
)
from jaxlm.interop.hub_rope import write_rope
from pallas_kernels.common.errors import UserError

# Fields that say how to compute: a config.json does not hold them.
_COMPUTE_FIELDS = ("dtype", "attention_implementation", "remat", "scan")
# Fields of the rotary embedding that each scaling reads, besides theta.
_ROPE_FIELDS = {
  "none": (),
  "linear": ("factor",),
  "ntk": ("factor",),
  "dynamic": ("factor", "original_length"),
  "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """Returns the config.json that reads back as this model with weights of type `dtype`.

  Raises UserError, naming the fields that none of the families can express.
  """
  attempts = {name: _write(config, name, dtype) for name in FAMILIES}
  lost_fields = {name: _differences(config, values) for name, values in attempts.items()}
  nearest = min(lost_fields, key=lambda name: len(lost_fields[name]))
  if lost_fields[nearest]:
    names = lost_fields[nearest]
    listed = ", ".join(f"model.{name}={getattr(config, name)!r}" for name in names)
    rule = f"no {' or '.join(FAMILIES)} model can have this (the nearest is {nearest})"
    raise UserError(f"{listed}: {rule}")
  return attempts[nearest]


def _differences(config: ModelConfig, values: dict[str, Any]) -> list[str]:
  """Returns the fields in which `config` differs from the model that `values` describe."""
  try:
    back, _ = parse_config(values, "written")
  except ValueError:
    return [field.name for field in dataclasses.fields(config)]
  ignored_fields = set(_COMPUTE_FIELDS)
  if config.max_length is None:
    ignored_fields.add("max_length")
  if "window" not in config.attention:
    ignored_fields.add("window")
  if (config.query_width or config.H) == (back.query_width or back.H):
    ignored_fields.add("query_width")
  pattern = shortest_pattern(config.attention * (config.layers // len(config.attention)))
  config = dataclasses.replace(config, attention=pattern, rope=_used_fields(config.rope))
  names = [field.name for field in dataclasses.fields(config) if field.name not in ignored_fields]
  return [name for name in names if getattr(config, name) != getattr(back, name)]


def _used_fields(rope: RopeConfig) -> RopeConfig:
  """Returns `rope` with the defaults in the fields that its scaling does not read."""
  if rope.scaling == "yarn":
    return dataclasses.replace(rope, low_freq_factor=1.0, high_freq_factor=4.0)
  names = ("theta", "scaling", *_ROPE_FIELDS[rope.scaling])
  return RopeConfig(**{name: getattr(rope, name) for name in names})


def _write(c: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
  family = FAMILIES[name]
  lengths = {} if c.max_length is None else {"max_position_embeddings": c.max_length}
  if c.rope.scaling == "dynamic":
    lengths = {"max_position_embeddings": c.rope.original_length}
  activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  values = {
    "architectures": [family.architecture],
    "model_type": name,
    "vocab_size": c.V,
    "hidden_size": c.D,
    "intermediate_size": c.F,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.N,
    "num_key_value_heads": c.K,
    "head_dim": c.H,
    **lengths,
    "rms_norm_eps": c.norm_eps,
    family.activation_key: activations[c.activation],
    "tie_word_embeddings": c.tied,
    **write_rope(c.rope),
    "torch_dtype": dtype,
  }
  if family.bias_key:
    values["attention_bias"] = c.qkv_bias
  if name == "llama":
    values["mlp_bias"] = c.mlp_bias
  if name == "gemma2":
    width = c.query_width or c.H
    values["query_pre_attn_scalar"] = int(width) if width == int(width) else width
    values["attn_logit_softcapping"] = c.attention_cap
    values["final_logit_softcapping"] = c.logit_cap
  return values | _write_windows(c, family)


def _write_windows(c: ModelConfig, family: Family) -> dict[str, Any]:
  if family.windows == "none":
    return {}
  kinds = c.attention * (c.layers // len(c.attention))
  names = {ours: theirs for theirs, ours in KINDS.items()}
  window = c.window if "window" in kinds else None
  values: dict[str, Any] = {
    "layer_types": [names[kind] for kind in kinds],
    "sliding_window": window,
  }
  if family.windows == "some":
    first = kinds.index("window") if window else c.layers
    values |= {"use_sliding_window": window is not None, "max_window_layers": first}
  return values
