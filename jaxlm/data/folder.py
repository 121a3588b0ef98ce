"""Finds the text files of a folder, and leaves out what is there for other reasons.

What is left out is counted by its reason: what operating systems and editors leave behind, hidden
files, runs and token stores of this project, checkpoints, links, and files of other endings.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from pathlib import Path

from jaxlm.data.formats import ENDINGS
from jaxlm.data.store import is_store
from jaxlm.paths import left_by_system
from pallas_kernels.common.errors import UserError

RUN_FIELDS = frozenset(("run", "steps", "model", "optimizer", "data"))  # of a run's config.json


@dataclasses.dataclass(frozen=True)
class FolderText:
  """Holds the text files of a folder, and why others are not among them."""

  names: tuple[str, ...]
  """Paths below the folder, POSIX, sorted."""
  notes: tuple[str, ...]
  """Says for each reason how many files and folders were left out for it, as "links: 3"."""


def find_text(
  root: Path,
  *,
  endings: tuple[str, ...] = ENDINGS,
  skip: frozenset[str] = frozenset(),
  follow_links: bool = False,
) -> FolderText:
  """Returns the files below `root` with these endings, without folders named in `skip`.

  Of links only those are followed that the Hub's cache makes, from a snapshot to its blobs, unless
  `follow_links`; a file that was found already is left out. Raises UserError for a folder or a file
  that cannot be read.
  """
  left_out = collections.Counter[str]()
  names = list[str]()
  seen = set[str]()

  def fail(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

  for folder, folders, files in os.walk(root, onerror=fail, followlinks=follow_links):
    below = []
    for name in sorted(folders):
      if name in skip:
        continue
      reason = _reason_of_folder(Path(folder, name), follow_links, seen)
      left_out.update([reason] if reason else [])
      below += [] if reason else [name]
    folders[:] = below
    for name in sorted(files):
      path = Path(folder, name)
      reason = _reason_of_file(path, endings, follow_links, seen)
      left_out.update([reason] if reason else [])
      if not reason:
        if not os.access(path, os.R_OK):
          raise UserError(f"{path}: cannot be read: permission denied")
        names.append(path.relative_to(root).as_posix())
  notes = tuple(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
  return FolderText(tuple(sorted(names)), notes)


def is_run(folder: Path) -> bool:
  """Returns whether a folder holds a run of this project."""
  try:
    config = json.loads((folder / "config.json").read_bytes())
  except (OSError, ValueError):
    return False
  return isinstance(config, dict) and config.keys() >= RUN_FIELDS


def _reason_of_folder(path: Path, follow_links: bool, seen: set[str]) -> str:
  """Returns why nothing below a folder is read, or nothing."""
  if path.is_symlink() and not follow_links:
    return "links not followed (data.follow_links)"
  if left_by_system(path.name) or path.name == "__pycache__":
    return "files and folders of the system or hidden"
  if is_run(path):
    return "folders of runs"
  if is_store(path):
    return "token stores"
  if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
    return "folders of checkpoints"
  return _seen_before(path, seen) if follow_links else ""


def _reason_of_file(
  path: Path, endings: tuple[str, ...], follow_links: bool, seen: set[str]
) -> str:
  """Returns why a file is not read, or nothing."""
  name = path.name
  if left_by_system(name) or name.startswith("~$"):  # "~$": an open document of Office
    return "files and folders of the system or hidden"
  if not name.lower().endswith(endings):
    return "files of other endings"
  link = path.is_symlink()
  if link and not path.exists():
    return "links to nothing"
  if link and not (follow_links or _is_hub_link(path)):
    return "links not followed (data.follow_links)"
  if not path.is_file():
    return "files that are no regular ones"
  return _seen_before(path, seen) if link or follow_links else ""


def _seen_before(path: Path, seen: set[str]) -> str:
  place = os.path.realpath(path)
  if place in seen:
    return "links to what is read already"
  seen.add(place)
  return ""


def _is_hub_link(path: Path) -> bool:
  """Returns whether a link leads from a snapshot in the Hub's cache to the blobs beside it."""
  blobs = path.resolve().parent
  return blobs.name == "blobs" and blobs.parent / "snapshots" in path.parent.resolve().parents
