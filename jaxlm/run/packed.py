"""Writes and opens folders of quantised models: weights in bytes, configuration and tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import MeshConfig, TrainConfig, check
from jaxlm.config_json import from_dict, to_dict
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.interop import safetensors
from jaxlm.models import Transformer

CONFIG_FILE = "packed.json"
WEIGHTS_FILE = "packed.safetensors"


class PackedModel(NamedTuple):
  """Holds what the folder of a quantised model has: the fields of a `SavedRun`."""

  config: TrainConfig
  tokenizer: Tokenizer
  params: Any
  step: int
  start_ids: tuple[int, ...]
  end_ids: tuple[int, ...]


def is_packed(path: Path) -> bool:
  """Returns whether this is the folder of a quantised model."""
  return (path / CONFIG_FILE).is_file()


def save(folder: Path, model: PackedModel) -> int:
  """Writes a new folder; returns the bytes of its weights. Raises UserError where it exists."""
  rule = "must not exist, or be empty"
  check(not folder.exists() or not any(folder.iterdir()), "target", str(folder), rule)
  folder.mkdir(parents=True, exist_ok=True)
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(model.params))
  }
  shapes = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves.items()}
  safetensors.write(folder / WEIGHTS_FILE, shapes, leaves.__getitem__)
  model.tokenizer.save(folder)
  values = {
    "config": to_dict(model.config),
    "step": model.step,
    "start_ids": list(model.start_ids),
    "end_ids": list(model.end_ids),
  }
  (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1) + "\n")
  return sum(leaf.nbytes for leaf in leaves.values())


def read_config(folder: Path) -> TrainConfig:
  """Returns the configuration of a quantised model; its data are those of the run that it was."""
  return from_dict(TrainConfig, json.loads((folder / CONFIG_FILE).read_text())["config"])


def load(folder: Path) -> PackedModel:
  """Opens a folder that `save` wrote.

  Raises UserError for a damaged file, or one whose arrays are not those of its configuration.
  """
  values = json.loads((folder / CONFIG_FILE).read_text())
  config = dataclasses.replace(read_config(folder), mesh=MeshConfig(data=1))
  path = folder / WEIGHTS_FILE
  entries, file = safetensors.read_header(path), safetensors.MappedFile(path)
  like = jax.eval_shape(Transformer(config.model).init, jax.random.key(0))

  def read(key: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(key, simple=True, separator=".")
    check(name in entries, f"{path}: tensor", name, "is missing")
    entry = entries.pop(name)
    got = f"{entry.dtype} {entry.shape}"
    kind = leaf.dtype if leaf.dtype == np.uint8 else entry.dtype
    good = entry.shape == leaf.shape and entry.dtype == kind
    check(good, f"{path}: {name}", got, f"must be {leaf.dtype} {leaf.shape}")
    return jax.numpy.asarray(file.view(entry))

  params = jax.tree_util.tree_map_with_path(read, like)
  check(not entries, f"{path}: tensors", sorted(entries)[:3], "belong to no weight")
  tokenizer = load_tokenizer(folder, config.data, config.model.V)
  starts, ends = tuple(values["start_ids"]), tuple(values["end_ids"])
  return PackedModel(config, tokenizer, params, values["step"], starts, ends)
