"""Checks that the tensors of a folder are exactly those of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.interop.hub_folder import CONFIG
from jaxlm.interop.safetensors import DTYPES, Entry, MappedFile
from jaxlm.interop.weight_names import count_tensors, is_buffer, list_weights
from pallas_kernels.common.errors import UserError

_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_AT_ONCE = 1 << 12
_PACKED = frozenset(("int8", "uint8", "int32", "uint32", "float8_e4m3fn", "float8_e5m2"))
_BY_FLAG = "--dtype (dtype= in Python) says which to load"


def check_tensors(
  config: ModelConfig,
  tensors: Mapping[str, Entry],
  folder: Path,
  stated: str | None,
  wanted: np.dtype | None,
  ignored: tuple[str, ...] = (),
) -> np.dtype:
  """Returns the dtype that the loaded weights will have: `wanted`, or the one that all files have.

  `stated` is the dtype in config.json, `ignored` are patterns of names of surplus tensors. Raises
  UserError, naming file and tensor, for a tensor that is missing, surplus, quantized, or of another
  shape than the model's, and without `wanted` for one whose dtype is not the stated one or not that
  of the others.
  """
  needed_count = count_tensors(config)
  if needed_count > len(tensors):  # before the names of a million layers are listed
    names = (name for weight in list_weights(config) for name in weight.names)
    missing = next(name for name in names if name not in tensors)
    counts = f"{needed_count} tensors are needed, {len(tensors)} are there"
    raise UserError(f"{folder}: {counts}; missing: {missing}{_hint(tensors)}")
  needed = {name: weight for weight in list_weights(config) for name in weight.names}
  for name, weight in needed.items():
    if name not in tensors:
      raise UserError(f"{folder}: tensor {name} is missing{_hint(tensors)}")
    entry = tensors[name]
    where = f"{entry.file}: tensor {name}"
    if entry.dtype not in DTYPES.values():
      rule = f"only weights of {', '.join(map(str, DTYPES.values()))} are read"
      raise UserError(f"{where} is {entry.dtype}{_hint(tensors)}: {rule}")
    if entry.shape != weight.file_shape:
      raise UserError(f"{where} has shape {entry.shape}, {CONFIG} asks for {weight.file_shape}")
    if wanted is None and stated is not None and entry.dtype != stated:
      raise UserError(f"{where} is {entry.dtype}, {CONFIG} states {stated}; {_BY_FLAG}")
  _check_surplus(config, {name: tensors[name] for name in tensors if name not in needed}, ignored)
  dtypes = {tensors[name].dtype for name in needed}
  if wanted is not None:
    return wanted
  if len(dtypes) > 1:
    listed = ", ".join(sorted(map(str, dtypes)))
    raise UserError(f"{folder}: tensors of types {listed}; {_BY_FLAG}")
  return dtypes.pop()


def _check_surplus(
  config: ModelConfig, surplus: Mapping[str, Entry], ignored: tuple[str, ...]
) -> None:
  """Raises UserError for a tensor that is no weight, and for a pattern that matches none of them.

  Buffers, and the head of a model that is tied, are let through.
  """
  for pattern in ignored:
    if not fnmatch.filter(surplus, pattern):
      rule = "matches no tensor besides the model's weights"
      raise UserError(f"ignore_tensors={pattern!r}: {rule}")
  for name, entry in surplus.items():
    harmless = is_buffer(name) or (config.tied and name == _HEAD)
    if not harmless and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
      rule = "belongs to no parameter of this model"
      flag = f"--ignore_tensors {name[:200]} reads the rest without it"
      raise UserError(f"{entry.file}: tensor {name[:200]!r} {rule} ({flag})")


def _hint(tensors: Mapping[str, Entry]) -> str:
  """Returns what else the names and types of the tensors say, for the end of a message."""
  packed = {str(entry.dtype) for entry in tensors.values()} & _PACKED
  if packed:
    return f" (quantized: tensors of {', '.join(sorted(packed))}; dequantize the model first)"
  if any("lora_" in name or name.startswith("base_model.") for name in tensors):
    return " (the names are those of an adapter; merge it into its base model first)"
  return ""


def check_tied_head(
  config: ModelConfig,
  tensors: Mapping[str, Entry],
  files: Mapping[Path, MappedFile],
  ignored: tuple[str, ...] = (),
) -> None:
  """Raises UserError if a tied checkpoint stores a head that differs from its embedding.

  It may repeat the embedding as its head, also in another dtype; another head would be lost, which
  a pattern in `ignored` permits.
  """
  if not config.tied or _HEAD not in tensors:
    return
  if any(fnmatch.fnmatchcase(_HEAD, pattern) for pattern in ignored):
    return
  head_VD = files[tensors[_HEAD].file].view(tensors[_HEAD])
  embed_VD = files[tensors[_EMBED].file].view(tensors[_EMBED])
  same = head_VD.shape == embed_VD.shape
  if same:
    starts = range(0, len(head_VD), _ROWS_AT_ONCE)
    parts = (slice(start, start + _ROWS_AT_ONCE) for start in starts)
    same = all(_are_equal(head_VD[part], embed_VD[part]) for part in parts)
  if not same:
    rule = f"{_HEAD} differs from {_EMBED}, but tie_word_embeddings is true"
    flag = f"--ignore_tensors {_HEAD} takes the embedding"
    raise UserError(f"{tensors[_HEAD].file}: {rule} ({flag})")


def _are_equal(left: np.ndarray, right: np.ndarray) -> bool:
  """Returns whether arrays are the same bit for bit, or after the wider one is cast."""
  if left.dtype == right.dtype:
    return left.tobytes() == right.tobytes()
  narrow = min(left.dtype, right.dtype, key=lambda dtype: (dtype.itemsize, str(dtype)))
  return left.astype(narrow).tobytes() == right.astype(narrow).tobytes()
