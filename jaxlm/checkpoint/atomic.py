"""Writes small files that are there whole or not at all, whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp"  # what an interrupted write may leave behind, after the file's own name


def write_text(path: Path, text: str) -> None:
  """Puts `text` in the place of `path` in one step, on disk before it returns.

  An OSError leaves the former file.
  """
  temporary = path.with_name(path.name + TEMPORARY)
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
  """Makes the rename itself survive a power failure."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
