"""Loads and saves checkpoints in the Hub's layout: Llama 2 and 3, Qwen2 and 2.5, Qwen3, Gemma 2.

Only safetensors are read; pickle never is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxlm.config import ModelConfig, check
from jaxlm.interop import safetensors
from jaxlm.interop.compressed_tensors import (
  Tensor,
  packed_formats,
  packed_tensors,
  quantization_config,
)
from jaxlm.interop.hub_config import read_config
from jaxlm.interop.hub_export import write_config
from jaxlm.interop.hub_folder import (
  CONFIG,
  NOTHING,
  Ignored,
  find_tokenizer,
  is_checkpoint,
  local_folder,
)
from jaxlm.interop.hub_text import NO_TEXT_FILES, TextFiles
from jaxlm.interop.placement import TensorSource, assemble
from jaxlm.interop.safetensors import Entry, MappedFile
from jaxlm.interop.tensor_checks import check_tensors, check_tied_head
from jaxlm.interop.weight_files import INDEX, SINGLE, find_tensors, plan_files
from jaxlm.interop.weight_names import Weight, list_weights
from jaxlm.models import Transformer
from jaxlm.paths import local_path
from pallas_kernels.common.errors import UserError

__all__ = [
  "NOTHING",
  "Ignored",
  "check_new",
  "find_tokenizer",
  "inspect",
  "is_checkpoint",
  "load",
  "local_folder",
  "resolve_dtype",
  "save",
]


def load(
  path: str | Path, dtype: DTypeLike | None = None, ignored: Ignored = NOTHING
) -> tuple[ModelConfig, Any]:
  """Returns the configuration and the parameters of a checkpoint folder, or of `hf:owner/name`.

  The weights get `dtype` (a name such as "bfloat16", or a jax or numpy dtype), by default that of
  the files, which then must all have the dtype that config.json states. They go tensor by tensor
  to where the current mesh wants them (`jax.set_mesh`; without one, to the first device).

  What `ignored` names is read as if it were not there.

  Raises UserError, naming file, tensor and rule, before it allocates anything: for an unknown
  architecture, fields of config.json that are unknown or contradict each other, and tensors that
  are missing, surplus, of another shape or dtype than the configuration says, or damaged.
  """
  folder = local_folder(path)
  config, tensors, weight_dtype = inspect(folder, dtype, ignored)
  targets = _shard_targets(config, weight_dtype, folder)
  files = {file: MappedFile(file) for file in {entry.file for entry in tensors.values()}}
  check_tied_head(config, tensors, files, ignored.tensors)
  params: dict[str, Any] = {}
  with ThreadPoolExecutor() as pool:
    for weight in list_weights(config):
      sources = [_open_source(weight, tensors[name], files) for name in weight.names]
      array = assemble(_leaf_at(targets, weight.path), sources, weight.stacked, pool)
      _insert(params, weight.path, array)
  return config, params


def inspect(
  folder: Path, dtype: DTypeLike | None = None, ignored: Ignored = NOTHING
) -> tuple[ModelConfig, dict[str, Entry], np.dtype]:
  """Reads config.json and the headers of the weight files, but no weights.

  Returns the configuration, where each tensor lies, and the dtype that loaded weights will have.
  Refuses everything that `load` refuses, except a tied head that is not the embedding and a mesh
  that does not fit.
  """
  wanted = None if dtype is None else resolve_dtype(dtype)
  config, stated = read_config(folder / CONFIG, ignored.config)
  tensors = find_tensors(folder)
  weight_dtype = check_tensors(config, tensors, folder, stated, wanted, ignored.tensors)
  return config, tensors, weight_dtype


def resolve_dtype(dtype: DTypeLike) -> np.dtype:
  """Returns the numpy dtype of a name or of a jax or numpy dtype.

  Raises UserError for anything but float32, bfloat16 and float16.
  """
  rule = "must be float32, bfloat16 or float16, as a name or a dtype"
  try:
    resolved = np.dtype(jnp.dtype(dtype))
  except TypeError:
    raise UserError(f"dtype={dtype!r}: {rule}") from None
  check(resolved in safetensors.DTYPES.values(), "dtype", dtype, rule)
  return resolved


def _open_source(weight: Weight, entry: Entry, files: Mapping[Path, MappedFile]) -> TensorSource:
  file = files[entry.file]
  values = file.view(entry)
  return TensorSource(
    values.T if weight.transposed else values,
    lambda: file.advise(entry, "WILLNEED"),
    lambda: file.advise(entry, "DONTNEED"),
  )


def _shard_targets(config: ModelConfig, dtype: np.dtype, folder: Path) -> Any:
  """Returns shape, dtype and sharding of every parameter on the current mesh.

  Raises UserError where they do not divide over it.
  """
  mesh = jax.sharding.get_mesh()
  try:
    abstract = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  except UserError as error:
    raise UserError(f"{folder}: {error}") from error

  def target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = None if mesh.empty else NamedSharding(mesh, jax.typeof(x).sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

  return jax.tree.map(target, abstract)


def save(
  path: str | Path,
  config: ModelConfig,
  params: Any,
  *,
  max_file_bytes: int = 5 * 10**9,
  text_files: TextFiles = NO_TEXT_FILES,
) -> None:
  """Writes a checkpoint folder that transformers and other tools open, as `load` does.

  Weights that are in bytes under `config.quant` are written as compressed-tensors has them, which
  `load` does not read.
  Weights keep their dtype; a tree of gradients can be saved likewise. More than `max_file_bytes`
  of weights go to several files with an index. `text_files` are the tokenizer and what belongs to
  it. config.json is written last, so that an interrupted folder does not load.

  Raises UserError, before it writes anything, for a folder that holds a checkpoint already, a
  configuration that none of the architectures can express, and parameters of another shape than
  it says or of several dtypes.
  """
  folder = local_path(path, "checkpoint")
  check_new(folder)
  weights = list(list_weights(config))  # refuses the model before its parameters
  formats = packed_formats(config) if config.quant else {}
  config = dataclasses.replace(config, quant=())
  packed = {
    weight: format
    for weight in weights
    if _is_matrix(weight) and (format := formats.get(weight.path[:-1])) is not None
  }
  leaves = {weight: _checked_leaf(params, weight) for weight in weights if weight not in packed}
  dtypes = {np.dtype(leaf.dtype) for leaf in leaves.values()}
  if len(dtypes) > 1 or not dtypes <= set(safetensors.DTYPES.values()):
    listed = ", ".join(sorted(map(str, dtypes)))
    raise UserError(f"params: types {listed}, must be one of float32, bfloat16, float16")
  dtype = dtypes.pop()
  description = write_config(config, str(dtype)) | text_files.token_ids
  tensors: dict[str, Tensor] = {}
  for weight in weights:
    for row, name in enumerate(weight.names):
      if weight in leaves:
        read = functools.partial(_read_row, leaves[weight], weight, row)
        tensors[name] = Tensor(dtype, weight.file_shape, read)
      else:
        part = _leaf_at(params, weight.path[:-1])
        own = {n.removeprefix("packed_"): x[row] if weight.stacked else x for n, x in part.items()}
        tensors |= packed_tensors(name, own, packed[weight], weight.shape[0])
  if packed:
    linear = {name: packed.get(w) for w in weights if _is_matrix(w) for name in w.names}
    linear |= {"lm_head.weight": None} if config.tied else {}
    description["quantization_config"] = quantization_config(linear)

  folder.mkdir(parents=True, exist_ok=True)
  sizes = {name: math.prod(t.shape) * t.dtype.itemsize for name, t in tensors.items()}
  groups = list(plan_files(sizes, max_file_bytes))
  files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
  files = files if len(groups) > 1 else [SINGLE]
  for file, names in zip(files, groups):
    shapes = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    safetensors.write(folder / file, shapes, lambda name: tensors[name].read())
  if len(groups) > 1:
    weight_map = {name: file for file, names in zip(files, groups) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)
  for name, content in text_files.files.items():
    (folder / name).write_bytes(content)
  _write_json(folder / CONFIG, description)


def check_new(folder: Path) -> None:
  """Raises UserError for a folder that holds a checkpoint or a run, and for a file."""
  if any((folder / name).exists() for name in (CONFIG, SINGLE, INDEX)):
    raise UserError(f"{folder}: holds a checkpoint or a run already")
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder}: is a file, must be a folder")


def _is_matrix(weight: Weight) -> bool:
  """Returns whether the parameter is that of a linear layer, and not the embedding."""
  return weight.path[-1] == "weight" and weight.transposed


def _read_row(leaf: jax.Array, weight: Weight, row: int) -> np.ndarray:
  values = np.asarray(leaf[row] if weight.stacked else leaf)
  return values.T if weight.transposed else values


def _checked_leaf(params: Any, weight: Weight) -> jax.Array:
  where, shape = ".".join(weight.path), weight.shape
  if weight.stacked:
    shape = (len(weight.names), *shape)
  try:
    leaf = _leaf_at(params, weight.path)
  except (KeyError, TypeError):
    raise UserError(f"params: {where} is missing") from None
  check(leaf.shape == shape, f"params: {where} of shape", leaf.shape, f"must be {shape}")
  return leaf


def _leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def _write_json(path: Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")
