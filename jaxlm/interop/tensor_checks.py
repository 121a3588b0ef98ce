"""Checks that the tensors of a folder are exactly those of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.interop.hub_folder import CONFIG
from jaxlm.interop.safetensors import Entry, MappedFile
from jaxlm.interop.weight_names import count_tensors, list_weights
from pallas_kernels.common.errors import UserError

_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
# Rotary frequencies, which old files store; they are computed here.
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_ROWS_AT_ONCE = 1 << 12


def check_tensors(
  config: ModelConfig,
  tensors: Mapping[str, Entry],
  folder: Path,
  stated: str | None,
  wanted: np.dtype | None,
) -> np.dtype:
  """Returns the dtype that the loaded weights will have: `wanted`, or the one that all files have.

  `stated` is the dtype in config.json. Raises UserError, naming file and tensor, for a tensor that
  is missing, surplus, or of another shape than the model's, and without `wanted` for one whose
  dtype is not the stated one or not that of the others.
  """
  needed_count = count_tensors(config)
  if needed_count > len(tensors):  # before the names of a million layers are listed
    names = (name for weight in list_weights(config) for name in weight.names)
    missing = next(name for name in names if name not in tensors)
    counts = f"{needed_count} tensors are needed, {len(tensors)} are there"
    raise UserError(f"{folder}: {counts}; missing: {missing}")
  needed = {name: weight for weight in list_weights(config) for name in weight.names}
  for name, weight in needed.items():
    if name not in tensors:
      raise UserError(f"{folder}: tensor {name} is missing")
    entry = tensors[name]
    where = f"{entry.file}: tensor {name}"
    if entry.shape != weight.file_shape:
      raise UserError(f"{where} has shape {entry.shape}, {CONFIG} asks for {weight.file_shape}")
    if wanted is None and stated is not None and entry.dtype != stated:
      raise UserError(f"{where} is {entry.dtype}, {CONFIG} states {stated}; say which by dtype=")
  for name, entry in tensors.items():
    ignored = _FREQUENCIES.fullmatch(name) or (config.tied and name == _HEAD)
    if name not in needed and not ignored:
      raise UserError(f"{entry.file}: tensor {name[:200]!r} belongs to no parameter of this model")
  dtypes = {tensors[name].dtype for name in needed}
  if wanted is not None:
    return wanted
  if len(dtypes) > 1:
    listed = ", ".join(sorted(map(str, dtypes)))
    raise UserError(f"{folder}: tensors of types {listed}; say which by dtype=")
  return dtypes.pop()


def check_tied_head(
  config: ModelConfig, tensors: Mapping[str, Entry], files: Mapping[Path, MappedFile]
) -> None:
  """Raises UserError if a tied checkpoint stores a head that differs from its embedding.

  It may repeat the embedding as its head; another head would be lost.
  """
  if not config.tied or _HEAD not in tensors:
    return
  head_VD = files[tensors[_HEAD].file].view(tensors[_HEAD])
  embed_VD = files[tensors[_EMBED].file].view(tensors[_EMBED])
  same = head_VD.shape == embed_VD.shape and head_VD.dtype == embed_VD.dtype
  if same:
    starts = range(0, len(head_VD), _ROWS_AT_ONCE)
    parts = (slice(start, start + _ROWS_AT_ONCE) for start in starts)
    same = all(head_VD[part].tobytes() == embed_VD[part].tobytes() for part in parts)
  if not same:
    rule = f"{_HEAD} differs from {_EMBED}, but tie_word_embeddings is true"
    raise UserError(f"{tensors[_HEAD].file}: {rule}")
