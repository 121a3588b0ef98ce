"""Finds the tensors of a folder in the Hub's layout: one file, or several with an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.interop.safetensors import Entry, read_header
from jaxlm.interop.strict_json import read_object
from jaxlm.interop.weight_names import is_buffer
from pallas_kernels.common.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 24  # 100,000 tensors need less
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_tensors(folder: Path) -> dict[str, Entry]:
  """Returns all tensors of the folder by name; reads headers only, never pickle.

  Raises UserError, naming file, tensor and rule, for a folder without weights, a damaged header,
  and an index that does not say exactly what the files hold. Beside model.safetensors the index may
  name no other file.
  """
  single, index = folder / SINGLE, folder / INDEX
  if index.is_file():
    return _find_indexed(folder, index)
  if single.is_file():
    return read_header(single)
  pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
  hint = ""
  if pickles:
    hint = f"; {pickles[0]} may run code when read, convert it to safetensors elsewhere"
  raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")


def _find_indexed(folder: Path, index: Path) -> dict[str, Entry]:
  weight_map = read_object(index, MAX_INDEX_BYTES).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index}: weight_map must map tensor names to file names")
  for file_name in weight_map.values():
    if not _is_plain_name(file_name):
      rule = "must be the plain name of a .safetensors file of the folder"
      raise UserError(f"{index}: file {str(file_name)[:200]!r} {rule}")
  if (folder / SINGLE).is_file() and (others := {*weight_map.values()} - {SINGLE}):
    rule = f"names {min(others)}, but {SINGLE} is there too, which transformers reads; remove one"
    raise UserError(f"{index}: {rule}")
  tensors: dict[str, Entry] = {}
  for file_name in sorted(set(weight_map.values())):
    path = folder / file_name
    if not path.is_file():
      raise UserError(f"{index}: names {file_name!r}, which does not exist")
    for name, entry in read_header(path).items():
      if name in tensors:
        raise UserError(f"{path}: tensor {name[:200]!r} is also in {tensors[name].file.name}")
      if weight_map.get(name) != file_name and not is_buffer(name):
        raise UserError(f"{path}: tensor {name[:200]!r} is not where {index.name} says")
      tensors[name] = entry
  for name, file_name in weight_map.items():
    if name not in tensors and not is_buffer(name):
      raise UserError(f"{index}: tensor {name[:200]!r} is not in {file_name!r}")
  return tensors


def _is_plain_name(name: Any) -> bool:
  if not isinstance(name, str) or not name.endswith(".safetensors"):
    return False
  return Path(name).name == name and "\\" not in name


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
  """Yields groups of names, in order, of at most `max_bytes` each unless one tensor is larger."""
  group, total = list[str](), 0
  for name, size in sizes.items():
    if group and total + size > max_bytes:
      yield group
      group, total = [], 0
    group.append(name)
    total += size
  yield group
