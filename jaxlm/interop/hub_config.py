"""Reads config.json of Llama, Qwen2, Qwen3 and Gemma 2, in both of transformers' layouts.

Defaults of missing fields are those of the configuration classes of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxlm.config import ModelConfig, decoder, rearrange
from jaxlm.interop.fields import Fields, drop_fields
from jaxlm.interop.hub_bookkeeping import HARMLESS_AS, REASONS, is_harmless
from jaxlm.interop.hub_folder import MAX_CONFIG_BYTES
from jaxlm.interop.hub_rope import read_rope
from jaxlm.interop.strict_json import read_object
from pallas_kernels.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
  """Holds what a family fixes, and the defaults of the fields that it reads."""

  architecture: str
  """the only entry of `architectures`"""
  switches: dict[str, Any]
  """fields of the model that all members of the family share"""
  kv_heads: int | None = None
  head_dim: int | None = None
  max_length: int = 32768
  activation_key: str = "hidden_act"
  activation: str = "silu"
  tied: bool = False
  bias_key: bool = True
  """attention_bias says whether q, k, v and o have biases"""
  windows: str = "none"
  """which layers have windows: none, some (`use_sliding_window`), even (alternating by default)"""
  divides: bool = False
  """hidden_size must be a multiple of the heads, whatever head_dim is"""


_GEMMA = {"norm_offset": 1, "post_norms": True, "embed_scale": "root_width"}
FAMILIES = {
  "llama": Family("LlamaForCausalLM", {}, max_length=2048, divides=True),
  "qwen2": Family(
    "Qwen2ForCausalLM", {"qkv_bias": True}, kv_heads=32, bias_key=False, windows="some"
  ),
  "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, kv_heads=32, head_dim=128, windows="some"),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    _GEMMA,
    kv_heads=4,
    head_dim=256,
    max_length=8192,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    tied=True,
    windows="even",
    divides=True,
  ),
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_LAYERS = 4096


def read_config(path: Path, ignore_config: tuple[str, ...] = ()) -> tuple[ModelConfig, str | None]:
  """Returns the model of a config.json and the dtype that it states for the weights.

  The fields `ignore_config` (a key, or outer.inner) are read as if they were not there. Raises
  UserError, naming file, field and rule, for an unknown architecture, for fields that are unknown
  or contradict each other, and for values that no such model can have. Fields that do not change
  the numbers (`jaxlm.interop.hub_bookkeeping`) are ignored.
  """
  return parse_config(read_object(path, MAX_CONFIG_BYTES), str(path), ignore_config)


def parse_config(
  values: dict[str, Any], where: str, ignore_config: tuple[str, ...] = ()
) -> tuple[ModelConfig, str | None]:
  """Does what `read_config` does, given the parsed file; error messages begin with `where`."""
  fields = Fields(drop_fields(values, ignore_config, where), where)
  name = fields.read("model_type", str)
  if name not in FAMILIES:
    raise fields.error("model_type", name, f"must be one of {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  fields.expect(
    "architectures",
    [family.architecture],
    f"must be [{family.architecture!r}] for model_type {name!r}",
  )
  try:
    config = rearrange(decoder(**_read_model(fields, family, where)))
    dtype = _read_dtype(fields)
    for key, (value, rule) in HARMLESS_AS.items():
      fields.expect(key, value, rule)
    fields.refuse_unread(is_harmless, REASONS)
  except UserError as error:  # ModelConfig does not know the file
    raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
  return config, dtype


def _read_model(fields: Fields, family: Family, where: str) -> dict[str, Any]:
  D, N = fields.read("hidden_size", int), fields.read("num_attention_heads", int)
  head_dim = fields.read("head_dim", int, family.head_dim, optional=True)
  if D % N and (family.divides or head_dim is None):
    raise fields.error("hidden_size", D, f"must be a multiple of num_attention_heads={N}")
  max_length = fields.read("max_position_embeddings", int, family.max_length)
  activation = fields.read(family.activation_key, str, family.activation)
  if activation not in ACTIVATIONS:
    rule = f"must be one of {', '.join(ACTIVATIONS)}"
    raise fields.error(family.activation_key, activation, rule)
  fields.expect("hidden_act", activation, f"contradicts {family.activation_key}={activation!r}")
  layers = fields.read("num_hidden_layers", int)
  if layers > MAX_LAYERS:
    raise fields.error("num_hidden_layers", layers, f"must be at most {MAX_LAYERS}")
  # Qwen2 has biases whatever this key says; the tensors are checked to be those.
  bias = fields.read("attention_bias", bool, False, optional=not family.bias_key)
  bias = bias if family.bias_key else False
  return {
    "D": D,
    "N": N,
    "H": head_dim or D // N,
    "K": fields.read("num_key_value_heads", int, family.kv_heads, optional=True) or N,
    "F": fields.read("intermediate_size", int),
    "V": fields.read("vocab_size", int),
    "layers": layers,
    "rope": read_rope(fields, max_length, where),
    "max_length": max_length,
    "tied": fields.read("tie_word_embeddings", bool, family.tied),
    "norm_eps": fields.read("rms_norm_eps", float, 1e-6),
    "activation": ACTIVATIONS[activation],
    "qkv_bias": bias,
    "out_bias": bias,
    **family.switches,
    "windows": _read_windows(fields, family, layers),
    **(_read_llama(fields) if family is FAMILIES["llama"] else {}),
    **(_read_gemma(fields) if family is FAMILIES["gemma2"] else {}),
  }


def _read_llama(fields: Fields) -> dict[str, Any]:
  return {"bias": fields.read("mlp_bias", bool, False)}


def _read_gemma(fields: Fields) -> dict[str, Any]:
  fields.expect("use_bidirectional_attention", False, "must be false: attention here is causal")
  return {
    "query_width": fields.read("query_pre_attn_scalar", float, 256.0),
    "cap": fields.read("attn_logit_softcapping", float, 50.0, optional=True),
    "logit_cap": fields.read("final_logit_softcapping", float, 30.0, optional=True),
  }


def _read_windows(fields: Fields, family: Family, layers: int) -> list[int | None]:
  """Returns the window of each layer, None for full attention."""
  if family.windows == "none":
    return _read_no_windows(fields, layers)
  used = family.windows == "even" or fields.read("use_sliding_window", bool, False)
  window = fields.read("sliding_window", int, 4096, optional=True)
  fields.expect("sliding_window_size", window, f"contradicts sliding_window={window}")
  first = fields.read("max_window_layers", int, 28, least=0) if family.windows == "some" else 0
  listed = fields.read("layer_types", list, None, optional=True)
  if listed is not None:
    known = all(isinstance(kind, str) and kind in LAYER_TYPES for kind in listed)
    if len(listed) != layers or not known:
      raise fields.error("layer_types", listed, f"must be {layers} of {', '.join(LAYER_TYPES)}")
    kinds = listed
  elif family.windows == "even":
    kinds = [FULL if layer % 2 else SLIDING for layer in range(layers)]
  else:
    all_full = not used or window is None
    kinds = [FULL if all_full or layer < first else SLIDING for layer in range(layers)]
  if SLIDING in kinds and (not used or window is None):
    rule = "has windows, which use_sliding_window or sliding_window switches off"
    raise fields.error("layer_types", listed, rule)
  return [window if kind == SLIDING else None for kind in kinds]


def _read_no_windows(fields: Fields, layers: int) -> list[int | None]:
  """Reads what may say of a family without windows that it has none."""
  rule = "the family has no windows"
  if fields.expect("use_sliding_window", False, rule) is False:
    fields.read("sliding_window", int, None, optional=True)
    fields.read("max_window_layers", int, None, optional=True, least=0)
  fields.expect("layer_types", [FULL] * layers, rule)
  return [None] * layers


def _read_dtype(fields: Fields) -> str | None:
  """Returns the dtype that the file states, or None; torch.float32 is float32, auto states none."""
  old, new = (
    name and name.removeprefix("torch.")
    for name in (fields.read(key, str, None, optional=True) for key in ("torch_dtype", "dtype"))
  )
  if old is not None and new is not None and old != new:
    raise fields.error("torch_dtype", old, f"contradicts dtype={new!r}")
  stated = new or old
  return None if stated == "auto" else stated
