"""Writing config.json in the layout of transformers 4, which 5 reads too."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import AttentionConfig, ModelConfig, RopeConfig
from jaxlm.interop.hub_config import (
  ACTIVATIONS,
  FAMILIES,
  FULL,
  SLIDING,
  Family,
  parse_config,
)
from jaxlm.interop.hub_rope import write_rope


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """What config.json must hold so that it reads back as this model with weights of type `dtype`.

  ValueError names the fields that none of the families can express.
  """
  attempts = {name: _write(config, name, dtype) for name in FAMILIES}
  lost = {name: _differences(config, values) for name, values in attempts.items()}
  name = min(lost, key=lambda name: len(lost[name]))
  if lost[name]:
    rule = f"no {' or '.join(FAMILIES)} model can have this (the nearest is {name})"
    raise ValueError(f"{', '.join(lost[name])}: {rule}")
  return attempts[name]


def _differences(config: ModelConfig, values: dict[str, Any]) -> list[str]:
  """Returns "path=value" of each field in which the model that `values` describe differs."""
  try:
    back, _ = parse_config(values, "written")
  except ValueError:
    return [f"model.{field.name}" for field in dataclasses.fields(config)]
  free = ("prefix", "pattern", "remainder") + (("max_length",) if config.max_length is None else ())
  lost = _unequal("model", config, back, free)
  for ours, theirs in zip(config.layer_specs, back.layer_specs):
    if type(ours.mixer) is not type(theirs.mixer):
      lost.append(f"model.mixer={type(ours.mixer).__name__}")
      continue
    mixer = dataclasses.replace(
      ours.mixer,
      rope=_normal(ours.mixer.rope),
      query_width=_query_width(ours.mixer),
    )
    other = dataclasses.replace(theirs.mixer, query_width=_query_width(theirs.mixer))
    lost += _unequal("mixer", mixer, other)
    lost += _unequal("feedforward", ours.feedforward, theirs.feedforward)
  return list(dict.fromkeys(lost))


def _unequal(path: str, ours: Any, theirs: Any, free: tuple[str, ...] = ()) -> list[str]:
  names = [field.name for field in dataclasses.fields(ours) if field.name not in free]
  return [
    f"{path}.{name}={getattr(ours, name)!r}"
    for name in names
    if getattr(ours, name) != getattr(theirs, name)
  ]


def _query_width(mixer: AttentionConfig) -> float:
  return mixer.query_width or mixer.H


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
  """Returns config.json of this family, of the first layer and every layer's window."""
  family, mixer, feedforward = FAMILIES[name], c.layer_specs[0].mixer, c.layer_specs[0].feedforward
  lengths = {} if c.max_length is None else {"max_position_embeddings": c.max_length}
  if mixer.rope.scaling == "dynamic":
    lengths = {"max_position_embeddings": mixer.rope.original_length}
  activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  values = {
    "architectures": [family.architecture],
    "model_type": name,
    "vocab_size": c.V,
    "hidden_size": c.D,
    "intermediate_size": feedforward.F,
    "num_hidden_layers": c.layers,
    "num_attention_heads": mixer.N,
    "num_key_value_heads": mixer.K,
    "head_dim": mixer.H,
    **lengths,
    "rms_norm_eps": c.norm_eps,
    family.activation_key: activations[feedforward.activation],
    "tie_word_embeddings": c.tied,
    **write_rope(mixer.rope),
    "torch_dtype": dtype,
  }
  if family.bias_key:
    values["attention_bias"] = mixer.qkv_bias
  if name == "llama":
    values["mlp_bias"] = feedforward.bias
  if name == "gemma2":
    values["query_pre_attn_scalar"] = _whole(_query_width(mixer))
    values["attn_logit_softcapping"] = mixer.cap
    values["final_logit_softcapping"] = c.logit_cap
  return values | _write_windows(c, family)


def _write_windows(c: ModelConfig, family: Family) -> dict[str, Any]:
  if family.windows == "none":
    return {}
  windows = [spec.mixer.window for spec in c.layer_specs]
  window = next((window for window in windows if window), None)
  values: dict[str, Any] = {
    "layer_types": [SLIDING if window else FULL for window in windows],
    "sliding_window": window,
  }
  if family.windows == "some":
    first = next((layer for layer, window in enumerate(windows) if window), c.layers)
    values |= {"use_sliding_window": window is not None, "max_window_layers": first}
  return values


def _whole(value: float) -> int | float:
  return int(value) if value == int(value) else value
