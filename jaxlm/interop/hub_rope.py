"""Reads and writes the rotary embedding of config.json, in both of transformers' layouts.

Up to transformers 4: `rope_theta` and `rope_scaling`; from 5: `rope_parameters`.
"""

from __future__ import annotations

from typing import Any

from jaxlm.config import RopeConfig
from jaxlm.interop.fields import Fields

_SCALINGS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "dynamic",
  "yarn": "yarn",
  "llama3": "llama3",
}
_YARN_FIELDS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor")


def read_rope(fields: Fields, max_length: int, where: str) -> RopeConfig:
  """Reads the fields of either layout, or of both if they agree.

  `max_length` is max_position_embeddings. Raises UserError for two layouts that differ and for
  what this project does not compute.
  """
  theta = fields.read("rope_theta", float, None)
  old = fields.read("rope_scaling", dict, None, optional=True)
  new = fields.read("rope_parameters", dict, None, optional=True)
  if old is None and new is None:
    old = {}
  configs = [
    _read_layout(Fields(values, where, f"{key}."), theta, max_length)
    for key, values in (("rope_parameters", new), ("rope_scaling", old))
    if values is not None
  ]
  if len(configs) == 2 and configs[0] != configs[1]:
    raise fields.error("rope_scaling", old, f"contradicts rope_parameters={new}")
  return configs[0]


def _read_layout(rope: Fields, outer_theta: float | None, max_length: int) -> RopeConfig:
  rope.expect("partial_rotary_factor", 1.0, "must be 1: the whole head is rotated")
  theta = rope.read("rope_theta", float, None)
  if theta is not None and outer_theta is not None and theta != outer_theta:
    raise rope.error("rope_theta", theta, f"contradicts rope_theta={outer_theta} beside it")
  result: dict[str, Any] = {"theta": theta or outer_theta or 10_000.0}
  if result["theta"] <= 1:
    raise rope.error("rope_theta", result["theta"], "must be above 1")
  kind = _read_type(rope)
  if kind != "default":
    result |= {"scaling": _SCALINGS[kind], "factor": rope.read("factor", float)}
  if kind == "dynamic":
    result["original_length"] = max_length
    rule = f"must equal max_position_embeddings={max_length}"
    rope.expect("original_max_position_embeddings", max_length, rule)
  if kind == "llama3":
    result["original_length"] = rope.read("original_max_position_embeddings", int)
    result |= {key: rope.read(key, float) for key in _LLAMA3_FIELDS}
  if kind == "yarn":
    result["original_length"] = rope.read("original_max_position_embeddings", int, max_length)
    given = {key: rope.read(key, float, None, optional=True) for key in _YARN_FIELDS}
    result |= {key: value for key, value in given.items() if value is not None}
    result["truncate"] = rope.read("truncate", bool, True)
  # "finetuned" says that the model was trained at its long length; null says nothing
  rope.refuse_unread(lambda key, value: value is None or key == "finetuned")
  return RopeConfig(**result)


def _read_type(rope: Fields) -> str:
  new = rope.read("rope_type", str, None)
  old = rope.read("type", str, None)
  if new is not None and old is not None and new != old:
    raise rope.error("type", old, f"contradicts rope_type={new!r}")
  kind = new or old or "default"
  if kind not in _SCALINGS:
    raise rope.error("rope_type", kind, f"must be one of {', '.join(_SCALINGS)}")
  return kind


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """Returns the fields in the layout of transformers 4, which 5 reads too.

  The scaling "ntk" has no name there: it is written as "default", which does not read back.
  """
  kind = {scaling: name for name, scaling in _SCALINGS.items()}.get(rope.scaling, "default")
  scaling: dict[str, Any] = {"rope_type": kind, "factor": rope.factor}
  if kind in ("llama3", "yarn"):
    scaling["original_max_position_embeddings"] = rope.original_length
  if kind == "llama3":
    scaling |= {key: getattr(rope, key) for key in _LLAMA3_FIELDS}
  if kind == "yarn":
    given = {key: getattr(rope, key) for key in _YARN_FIELDS}
    scaling |= {key: value for key, value in given.items() if value is not None}
    scaling["truncate"] = rope.truncate
  return {"rope_theta": rope.theta, "rope_scaling": None if kind == "default" else scaling}
