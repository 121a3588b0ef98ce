"""Leaves nothing behind of what was refused or failed, so that the corrected command works."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.run.run_folder import LOCK, RunFolder
from sharding.multihost import is_main


@contextlib.contextmanager
def undone_unless_kept(folder: RunFolder) -> Iterator[Callable[[], None]]:
  """Restores the folder of a run after an exception, unless the given function was called before.

  Entered before anything is written. What is in the folder by then stays, but for what was made
  since: of files that a start replaces, such as configuration, environment and digests of the text,
  the former content comes back; the log goes on growing. Only the main process changes anything.
  """
  kept: list[bool] = []
  names = {path.name for path in folder.path.iterdir()} if is_main() else set()
  before = _replaced_files(folder) if is_main() else {}
  try:
    yield lambda: kept.append(True)
  except Exception:
    if is_main() and not kept:
      for path in folder.path.iterdir():
        if path.name not in {*names, LOCK}:
          _remove(path)
      for path, content in before.items():
        path.write_bytes(content)
    raise


@contextlib.contextmanager
def new_files_removed_if_failed(folder: Path) -> Iterator[None]:
  """Removes what comes into a folder, and the folder if it is new, where the work is not done."""
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  names = set() if missing else {path.name for path in folder.iterdir()}
  try:
    yield
  except BaseException:
    for path in folder.iterdir() if folder.is_dir() else ():
      if path.name not in names:
        _remove(path)
    with contextlib.suppress(OSError):  # the first that is not there, or not empty, ends it
      for path in missing:
        path.rmdir()
    raise


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _replaced_files(folder: RunFolder) -> dict[Path, bytes]:
  """Returns the content of the files that a start replaces and that do not grow with the steps."""
  growing = {LOCK, folder.log.name, folder.metrics.name, folder.evals.name}
  files = [path for path in folder.path.iterdir() if path.is_file() and path.name not in growing]
  return {path: path.read_bytes() for path in files}
