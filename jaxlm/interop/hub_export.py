"""Writing config.json in the layout of transformers 4, which 5 reads too."""

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

# These say how this project computes: a config.json does not hold them.
_NOT_STORED = ("dtype", "attention_implementation", "remat", "scan")


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """What config.json must hold so that it reads back as this model with weights of type `dtype`.

  ValueError names the fields that none of the families can express.
  """
  attempts = {name: _write(config, name, dtype) for name in FAMILIES}
  lost = {name: _differences(config, values) for name, values in attempts.items()}
  name = min(lost, key=lambda name: len(lost[name]))
  if lost[name]:
    what = ", ".join(f"model.{field}={getattr(config, field)!r}" for field in lost[name])
    raise ValueError(
      f"{what}: no {' or '.join(FAMILIES)} model can have this (the nearest is {name})"
    )
  return attempts[name]


def _differences(config: ModelConfig, values: dict[str, Any]) -> list[str]:
  """Fields in which the model that `values` describe is another one."""
  try:
    back, _ = parse_config(values, "written")
  except ValueError:
    return [field.name for field in dataclasses.fields(config)]
  free = {*_NOT_STORED, *(["max_length"] if config.max_length is None else [])}
  if "window" not in config.attention:
    free.add("window")
  pattern = shortest_pattern(config.attention * (config.layers // len(config.attention)))
  config = dataclasses.replace(config, attention=pattern, rope=_normal(config.rope))
  names = [field.name for field in dataclasses.fields(config) if field.name not in free]
  if (config.query_width or config.H) == (back.query_width or back.H):
    names.remove("query_width")
  return [name for name in names if getattr(config, name) != getattr(back, name)]


def _normal(rope: RopeConfig) -> RopeConfig:
  """Without what the chosen scaling does not read."""
  reads = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
  }
  if rope.scaling == "yarn":
    return dataclasses.replace(rope, low_freq_factor=1.0, high_freq_factor=4.0)
  kept = {name: getattr(rope, name) for name in ("theta", "scaling", *reads[rope.scaling])}
  return RopeConfig(**kept)


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
    values["query_pre_attn_scalar"] = _whole(c.query_width or c.H)
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


def _whole(value: float) -> int | float:
  return int(value) if value == int(value) else value
