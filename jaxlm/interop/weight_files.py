"""The weights of a folder in the Hub's layout: model.safetensors, or several files with an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxlm.interop.safetensors import Entry, read_header
from jaxlm.interop.strict_json import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 1 << 24  # bytes; 100,000 tensors need less
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_tensors(folder: Path) -> dict[str, Entry]:
  """All tensors of the folder by name; reads headers only, never pickle.

  Raises ValueError, naming file, tensor and rule, for a folder without weights, a header that is not sound, and an
  index that does not say exactly what the files hold.
  """
  single, index = (folder / name for name in (SINGLE, INDEX))
  if single.is_file() and index.is_file():
    raise ValueError(f"{folder}: holds both {SINGLE} and {INDEX}; which one counts is not defined")
  if single.is_file():
    return read_header(single)
  if index.is_file():
    return _find_indexed(folder, index)
  pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
  hint = (
    f"; {pickles[0]} may run code when read, convert it to safetensors elsewhere" if pickles else ""
  )
  raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")


def _find_indexed(folder: Path, index: Path) -> dict[str, Entry]:
  weight_map = read_object(index, MAX_INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index}: weight_map must map tensor names to file names")
  found: dict[str, Entry] = {}
  for file_name in sorted(set(map(_checked_name(index), weight_map.values()))):
    if not (folder / file_name).is_file():
      raise ValueError(f"{index}: names {file_name!r}, which does not exist")
    for name, entry in read_header(folder / file_name).items():
      if name in found:
        raise ValueError(
          f"{folder / file_name}: tensor {name[:200]!r} is also in {found[name].file.name}"
        )
      if weight_map.get(name) != file_name:
        raise ValueError(
          f"{folder / file_name}: tensor {name[:200]!r} is not where {index.name} says"
        )
      found[name] = entry
  if missing := next((name for name in weight_map if name not in found), None):
    raise ValueError(f"{index}: tensor {missing[:200]!r} is not in {weight_map[missing]!r}")
  return found


def _checked_name(index: Path):
  def check(name) -> str:
    if (
      not isinstance(name, str)
      or Path(name).name != name
      or "\\" in name
      or not name.endswith(".safetensors")
    ):
      raise ValueError(
        f"{index}: file {str(name)[:200]!r} must be the plain name of a .safetensors file of the folder"
      )
    return name

  return check


def plan_files(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Groups of tensor names, in order, of at most `limit` bytes each unless one tensor is larger."""
  group, total = list[str](), 0
  for name, size in sizes.items():
    if group and total + size > limit:
      yield group
      group, total = [], 0
    group.append(name)
    total += size
  yield group
