"""Writes config.json in the layout of transformers 4, which 5 reads too."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import AttentionConfig, ModelConfig, RopeConfig, check, revise
from jaxlm.interop.hub_config import (
  ACTIVATIONS,
  FAMILIES,
  FULL,
  SLIDING,
  Family,
  parse_config,
)
from jaxlm.interop.hub_rope import write_rope
from jaxlm.interop.weight_names import list_weights
from pallas_kernels.common.errors import UnsupportedError, UserError

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
  for mixer in _attentions(config):
    rule = f"every {' or '.join(FAMILIES)} model has rotary embedding in all layers"
    check(mixer.rope is not None, "mixer.rope", mixer.rope, rule)
  attempts = {name: _write(config, name, dtype) for name in FAMILIES}
  lost_fields = {name: _compare(config, values) for name, values in attempts.items()}
  nearest = min(lost_fields, key=lambda name: len(lost_fields[name]))
  if lost_fields[nearest]:
    rule = f"no {' or '.join(FAMILIES)} model can have this (the nearest is {nearest})"
    raise UserError(f"{', '.join(lost_fields[nearest])}: {rule}")
  return attempts[nearest]


def with_own_tokenizer(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
  """Returns the same model in a layout whose tokenizer.json transformers reads as it is.

  In Qwen2's layout transformers 5 takes the vocabulary alone, and splits and normalises text by
  its own `Qwen2Tokenizer`, whatever tokenizer_config.json names. In Llama's the output projections
  have a bias too, which is zero here. A model that Llama's cannot express stays as it is.
  """
  if not is_qwen2(config):
    return config, params
  biased = revise(config, out_bias=True)
  if _compare(biased, _write(biased, "llama", "float32")):
    return config, params
  dtype = params["embed"]["weight"].dtype
  params = jax.tree.map(lambda leaf: leaf, params)  # other dicts with the same arrays
  for weight in list_weights(biased):
    if weight.path[-3:] == ("mixer", "o", "bias"):
      projection = params
      for key in weight.path[:-1]:
        projection = projection[key]
      projection["bias"] = jnp.zeros((len(weight.names), *weight.shape), dtype)
  return biased, params


def is_qwen2(config: ModelConfig) -> bool:
  """Returns whether the model is written in Qwen2's layout."""
  return write_config(config, "float32")["model_type"] == "qwen2"


def _attentions(config: ModelConfig) -> list[AttentionConfig]:
  """Returns the mixers of all layers; raises UnsupportedError where one is no attention."""
  mixers = []
  for spec in config.layer_specs:
    if not isinstance(spec.mixer, AttentionConfig):
      kind, families = type(spec.mixer).__name__, " or ".join(FAMILIES)
      raise UnsupportedError(f"model: a layer is a {kind}: no {families} model has that")
    mixers.append(spec.mixer)
  return mixers


def _rope(mixer: AttentionConfig) -> RopeConfig:
  assert mixer.rope is not None, "write_config refuses it"
  return mixer.rope


def _compare(config: ModelConfig, values: dict[str, Any]) -> list[str]:
  """Returns "path=value" of the fields in which `config` differs from what `values` describe."""
  try:
    back, _ = parse_config(values, "written")
  except ValueError:
    return [f"model.{field.name}" for field in dataclasses.fields(config)]
  ignored_fields = {"prefix", "pattern", "remainder"}  # the layers are compared one by one
  if config.max_length is None:
    ignored_fields.add("max_length")
  lost_fields = _list_unequal("model", config, back, ignored_fields)
  for mine, read in zip(_attentions(config), _attentions(back)):
    lost_fields += _list_unequal("mixer", _drop_unused(mine), _drop_unused(read))
  for ours, theirs in zip(config.layer_specs, back.layer_specs):
    lost_fields += _list_unequal("feedforward", ours.feedforward, theirs.feedforward)
  return list(dict.fromkeys(lost_fields))


def _list_unequal(
  path: str, ours: Any, theirs: Any, ignored_fields: Collection[str] = ()
) -> list[str]:
  names = [field.name for field in dataclasses.fields(ours) if field.name not in ignored_fields]
  return [
    f"{path}.{name}={getattr(ours, name)!r}"
    for name in names
    if getattr(ours, name) != getattr(theirs, name)
  ]


def _drop_unused(mixer: AttentionConfig) -> AttentionConfig:
  """Returns `mixer` with the query width stated, and defaults where its rope reads nothing."""
  rope = _drop_unused_rope(_rope(mixer))
  return dataclasses.replace(mixer, rope=rope, query_width=mixer.query_width or float(mixer.H))


def _drop_unused_rope(rope: RopeConfig) -> RopeConfig:
  """Returns `rope` with the defaults in the fields that its scaling does not read."""
  if rope.scaling == "yarn":
    return dataclasses.replace(rope, low_freq_factor=1.0, high_freq_factor=4.0)
  names = ("theta", "scaling", *_ROPE_FIELDS[rope.scaling])
  return RopeConfig(**{name: getattr(rope, name) for name in names})


def _write(c: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
  """Returns a config.json of this family, from the first layer and every layer's window."""
  family, mixer, feedforward = FAMILIES[name], _attentions(c)[0], c.layer_specs[0].feedforward
  lengths = {} if c.max_length is None else {"max_position_embeddings": c.max_length}
  if _rope(mixer).scaling == "dynamic":
    lengths = {"max_position_embeddings": _rope(mixer).original_length}
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
    **write_rope(_rope(mixer)),
    "torch_dtype": dtype,
  }
  if family.bias_key:
    values["attention_bias"] = mixer.qkv_bias
  if name == "llama":
    values["mlp_bias"] = feedforward.bias
  if name == "gemma2":
    width = mixer.query_width or mixer.H
    values["query_pre_attn_scalar"] = int(width) if width == int(width) else width
    values["attn_logit_softcapping"] = mixer.cap
    values["final_logit_softcapping"] = c.logit_cap
  return values | _write_windows(c, family)


def _write_windows(c: ModelConfig, family: Family) -> dict[str, Any]:
  if family.windows == "none":
    return {}
  windows = [mixer.window for mixer in _attentions(c)]
  window = next((window for window in windows if window), None)
  values: dict[str, Any] = {
    "layer_types": [SLIDING if window else FULL for window in windows],
    "sliding_window": window,
  }
  if family.windows == "some":
    first = next((layer for layer, window in enumerate(windows) if window), c.layers)
    values |= {"use_sliding_window": window is not None, "max_window_layers": first}
  return values
