"""Checkpoints in the Hub's layout: `load` a folder or a published model, `save` one that others' tools open.

Llama 2 and 3, Qwen2 and 2.5, Qwen3, Gemma 2. Only safetensors are read; pickle never is.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.config import ModelConfig, check
from jaxlm.interop import safetensors
from jaxlm.interop.hub_config import MAX_BYTES, read_config
from jaxlm.interop.hub_export import write_config
from jaxlm.interop.placement import Source, assemble
from jaxlm.interop.safetensors import Entry, MappedFile
from jaxlm.interop.strict_json import read_object
from jaxlm.interop.weight_files import INDEX, SINGLE, find_tensors, plan_files
from jaxlm.interop.weight_names import Weight, tensor_count, weights
from jaxlm.models import Transformer

DType = Literal["float32", "bfloat16", "float16"]
CONFIG = "config.json"
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # computed here; old files store it
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DOWNLOADED = ["*.json", "*.safetensors"]


def load(path: str | Path, dtype: DType | None = None) -> tuple[ModelConfig, Any]:
  """(configuration, parameters) of a checkpoint folder, or of owner/name on the Hub (extra `hf`).

  The weights have type `dtype`, by default that of the files, which then must all have the type that config.json
  states. They go tensor by tensor to where the current mesh wants them (`jax.set_mesh`; without one, to the first
  device). The configuration computes in bfloat16 where the weights are bfloat16, else in float32.

  Raises ValueError, naming file, tensor and rule, before it allocates anything: for an unknown architecture, keys of
  config.json that are unknown or contradict each other, and tensors that are missing, surplus, of another shape or
  type than the configuration says, or whose file is damaged.
  """
  folder = local_folder(path)
  config, tensors, kind = inspect(folder, dtype)
  targets = _targets(config, kind, folder)
  files = {file: MappedFile(file) for file in {entry.file for entry in tensors.values()}}
  _check_tied_head(config, tensors, files)

  def source(weight: Weight, name: str) -> Source:
    entry = tensors[name]
    file = files[entry.file]
    view = file.view(entry)
    values = view.T if weight.transposed else view
    return Source(
      values, lambda: file.advise(entry, "WILLNEED"), lambda: file.advise(entry, "DONTNEED")
    )

  params: dict[str, Any] = {}
  with ThreadPoolExecutor() as pool:
    for weight in weights(config):
      sources = [source(weight, name) for name in weight.names]
      _insert(
        params, weight.path, assemble(_at(targets, weight.path), sources, weight.stacked, pool)
      )
  return config, params


def inspect(
  folder: Path, dtype: DType | None = None
) -> tuple[ModelConfig, dict[str, Entry], np.dtype]:
  """(configuration, where each tensor lies, type of the loaded weights), from config.json and headers alone.

  Everything that `load` refuses but for a tied head that is not the embedding, and a mesh that does not fit.
  """
  check(
    dtype in (None, "float32", "bfloat16", "float16"),
    "dtype",
    dtype,
    "must be float32, bfloat16 or float16",
  )
  config, stated = read_config(folder / CONFIG)
  tensors = find_tensors(folder)
  kind = _check_tensors(config, tensors, folder, stated, dtype)
  return config, tensors, kind


def local_folder(path: str | Path) -> Path:
  """The folder itself, or where the Hub's download of owner/name lies; ValueError where there is neither."""
  folder = Path(path)
  if folder.is_dir():
    return folder
  if not _REPOSITORY.fullmatch(str(path)):
    raise ValueError(f"{path}: no such folder, nor owner/name of a model on the Hub")
  try:
    from huggingface_hub import snapshot_download
  except ModuleNotFoundError:
    raise ValueError(
      f"{path}: no such folder; to download it from the Hub: pip install 'jaxlm[hf]'"
    ) from None
  try:
    return Path(snapshot_download(str(path), allow_patterns=_DOWNLOADED))
  except (OSError, ValueError) as error:  # no network, no such model, no permission
    raise ValueError(f"{path}: no such folder, and not from the Hub: {error}") from error


def is_checkpoint(path: str | Path) -> bool:
  """Whether `path` is a folder in the Hub's layout, or looks like the owner/name of one and is no folder."""
  folder = Path(path)
  if not folder.is_dir():
    return _REPOSITORY.fullmatch(str(path)) is not None
  return (folder / CONFIG).is_file() and "model_type" in read_object(folder / CONFIG, MAX_BYTES)


def _check_tensors(
  config: ModelConfig,
  tensors: dict[str, Entry],
  folder: Path,
  stated: str | None,
  wanted: DType | None,
) -> np.dtype:
  """The type that the loaded weights will have; ValueError unless the files hold exactly this model."""
  surplus = {name for name in tensors if _FREQUENCIES.fullmatch(name)}
  if config.tied:
    surplus.add(_HEAD)  # checked against the embedding
  if tensor_count(config) > len(tensors):
    first = _first_missing(config, tensors)
    raise ValueError(
      f"{folder}: {tensor_count(config)} tensors are needed, {len(tensors)} are there; missing: {first}"
    )
  needed = {name: weight for weight in weights(config) for name in weight.names}
  for name, weight in needed.items():
    if name not in tensors:
      raise ValueError(f"{folder}: tensor {name} is missing")
    entry = tensors[name]
    if entry.shape != weight.file_shape:
      raise ValueError(
        f"{entry.file}: tensor {name} has shape {entry.shape}, {CONFIG} asks for {weight.file_shape}"
      )
    if wanted is None and stated is not None and entry.dtype != stated:
      raise ValueError(
        f"{entry.file}: tensor {name} is {entry.dtype}, {CONFIG} states {stated}; say which by dtype="
      )
  for name in tensors:
    if name not in needed and name not in surplus:
      raise ValueError(
        f"{tensors[name].file}: tensor {name[:200]!r} belongs to no parameter of this model"
      )
  kinds = {tensors[name].dtype for name in needed}
  if wanted is None and len(kinds) > 1:
    raise ValueError(
      f"{folder}: tensors of types {', '.join(sorted(map(str, kinds)))}; say which by dtype="
    )
  return np.dtype(jnp.dtype(wanted)) if wanted else kinds.pop()


def _first_missing(config: ModelConfig, tensors: dict[str, Entry]) -> str:
  return next(name for weight in weights(config) for name in weight.names if name not in tensors)


def _check_tied_head(
  config: ModelConfig, tensors: dict[str, Entry], files: dict[Path, MappedFile]
) -> None:
  """A tied checkpoint may repeat the embedding as its head; another head would be lost, so ValueError."""
  if not config.tied or _HEAD not in tensors:
    return
  head, embed = (files[tensors[name].file].view(tensors[name]) for name in (_HEAD, _EMBED))
  same = head.shape == embed.shape and head.dtype == embed.dtype
  rows = 1 << 12
  if same:
    parts = (slice(start, start + rows) for start in range(0, len(head), rows))
    same = all(head[part].tobytes() == embed[part].tobytes() for part in parts)
  if not same:
    raise ValueError(
      f"{tensors[_HEAD].file}: {_HEAD} differs from {_EMBED}, but tie_word_embeddings is true"
    )


def _targets(config: ModelConfig, kind: np.dtype, folder: Path) -> Any:
  """Shape, dtype and sharding of every parameter on the current mesh; ValueError where they do not divide over it."""
  mesh = jax.sharding.get_mesh()
  try:
    abstract = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error

  def target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = None if mesh.empty else NamedSharding(mesh, jax.typeof(x).sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, kind, sharding=sharding)

  return jax.tree.map(target, abstract)


def save(
  path: str | Path, config: ModelConfig, params: Any, *, file_bytes: int = 5 * 10**9
) -> None:
  """Writes a checkpoint folder that transformers and other tools open; a tree of gradients saves likewise.

  Weights keep their type. More than `file_bytes` of them are spread over several files with an index. config.json
  is written last, so that an interrupted folder does not load. Raises ValueError, before it writes anything, for a
  folder that holds a checkpoint already, a configuration that none of the architectures can express, and parameters
  of another shape than it says or of several types.
  """
  folder = Path(path)
  if any((folder / name).exists() for name in (CONFIG, SINGLE, INDEX)):
    raise ValueError(f"{folder}: holds a checkpoint or a run already")
  leaves = {weight: _leaf(params, weight) for weight in weights(config)}
  kinds = {np.dtype(leaf.dtype) for leaf in leaves.values()}
  if len(kinds) > 1 or not kinds <= set(safetensors.DTYPES.values()):
    raise ValueError(
      f"params: types {', '.join(sorted(map(str, kinds)))}, must be one of float32, bfloat16, float16"
    )
  kind = kinds.pop()
  description = write_config(config, str(kind))
  needed = {name: (weight, row) for weight in leaves for row, name in enumerate(weight.names)}

  def read(name: str) -> np.ndarray:
    weight, row = needed[name]
    values = np.asarray(leaves[weight][row] if weight.stacked else leaves[weight])
    return values.T if weight.transposed else values

  folder.mkdir(parents=True, exist_ok=True)
  sizes = {name: int(np.prod(weight.shape)) * kind.itemsize for name, (weight, _) in needed.items()}
  groups = list(plan_files(sizes, file_bytes))
  files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
  files = files if len(groups) > 1 else [SINGLE]
  for file, names in zip(files, groups):
    safetensors.write(
      folder / file, {name: (kind, needed[name][0].file_shape) for name in names}, read
    )
  if len(groups) > 1:
    weight_map = {name: file for file, names in zip(files, groups) for name in names}
    _write_json(
      folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    )
  _write_json(folder / CONFIG, description)


def _leaf(params: Any, weight: Weight) -> jax.Array:
  where, shape = ".".join(weight.path), weight.shape
  if weight.stacked:
    shape = (len(weight.names), *shape)
  try:
    leaf = _at(params, weight.path)
  except (KeyError, TypeError):
    raise ValueError(f"params: {where} is missing") from None
  check(leaf.shape == shape, f"params: {where} of shape", leaf.shape, f"must be {shape}")
  return leaf


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def _write_json(path: Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")
