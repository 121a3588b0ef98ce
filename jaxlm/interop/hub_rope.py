"""Rotary embedding in config.json: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""

from __future__ import annotations

from typing import Any

from jaxlm.config import RopeConfig
from jaxlm.interop.fields import Fields

_TYPES = {
  "default": "none",
  "linear": "linear",
  "dynamic": "dynamic",
  "yarn": "yarn",
  "llama3": "llama3",
}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def read_rope(fields: Fields, max_length: int, where: str) -> RopeConfig:
  """Takes the keys of either layout; ValueError where both are there and differ, and for what is not supported."""
  theta = fields.take("rope_theta", float, None)
  old = fields.take("rope_scaling", dict, None, optional=True)
  new = fields.take("rope_parameters", dict, None, optional=True)
  found = [_read(values, theta, max_length, f"{where}: {key}") for key, values in _given(old, new)]
  if len(found) == 2 and found[0] != found[1]:
    raise fields.fail("rope_scaling", old, f"contradicts rope_parameters={new}")
  return found[0]


def _given(old: dict | None, new: dict | None) -> list[tuple[str, dict]]:
  pairs = [("rope_parameters", new), ("rope_scaling", old)]
  return [(key, values) for key, values in pairs if values is not None] or [("rope_scaling", {})]


def _read(values: dict[str, Any], theta: float | None, max_length: int, where: str) -> RopeConfig:
  rope = Fields(values, where)
  rope.expect("partial_rotary_factor", 1.0, "must be 1: the whole head is rotated")
  inner = rope.take("rope_theta", float, None)
  if None not in (theta, inner) and theta != inner:
    raise rope.fail("rope_theta", inner, f"contradicts rope_theta={theta} beside it")
  result: dict[str, Any] = {"theta": inner or theta or 10_000.0}
  if result["theta"] <= 1:
    raise rope.fail("rope_theta", result["theta"], "must be above 1")
  kind = _kind(rope)
  if kind != "default":
    result |= {"scaling": _TYPES[kind], "factor": rope.take("factor", float)}
  if kind == "dynamic":
    result["original_length"] = max_length
    rope.expect(
      "original_max_position_embeddings",
      max_length,
      f"must equal max_position_embeddings={max_length}",
    )
  if kind == "llama3":
    result["original_length"] = rope.take("original_max_position_embeddings", int)
    result |= {key: rope.take(key, float) for key in ("low_freq_factor", "high_freq_factor")}
  if kind == "yarn":
    result["original_length"] = rope.take("original_max_position_embeddings", int, max_length)
    given = {key: rope.take(key, float, None, optional=True) for key in _YARN}
    result |= {key: value for key, value in given.items() if value is not None}
    result["truncate"] = rope.take("truncate", bool, True)
  rope.finish()
  return RopeConfig(**result)


def _kind(rope: Fields) -> str:
  new, old = rope.take("rope_type", str, None), rope.take("type", str, None)
  if None not in (new, old) and new != old:
    raise rope.fail("type", old, f"contradicts rope_type={new!r}")
  kind = new or old or "default"
  if kind not in _TYPES:
    raise rope.fail("rope_type", kind, f"must be one of {', '.join(_TYPES)}")
  return kind


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """The keys of transformers 4, which 5 reads too. "ntk" has no name there: what is written does not read back."""
  kind = {scaling: name for name, scaling in _TYPES.items()}.get(rope.scaling, "default")
  scaling: dict[str, Any] = {"rope_type": kind, "factor": rope.factor}
  if kind in ("llama3", "yarn"):
    scaling["original_max_position_embeddings"] = rope.original_length
  if kind == "llama3":
    scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if kind == "yarn":
    scaling |= {key: getattr(rope, key) for key in _YARN if getattr(rope, key) is not None}
    scaling["truncate"] = rope.truncate
  return {"rope_theta": rope.theta, "rope_scaling": None if kind == "default" else scaling}
