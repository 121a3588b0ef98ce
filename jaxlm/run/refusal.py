"""Leaves nothing behind of a start that was refused, so that the corrected command works."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxlm.run.run_folder import LOCK, RunFolder, read_records
from pallas_kernels.common.errors import UserError
from sharding.multihost import is_main


@contextlib.contextmanager
def undo_if_refused(folder: RunFolder, start: int) -> Iterator[None]:
  """Restores the folder of a run where a UserError comes before a step after `start` has ended.

  Entered before anything is written. A folder that was empty is emptied again; in one that was not,
  small files such as configuration, environment and digests of the text get their former content,
  while checkpoints, records and the log stay.
  """
  if not is_main():
    yield
    return
  before = _small_files(folder)
  was_empty = not before
  try:
    yield
  except UserError:
    if not _has_trained(folder, start):
      written = folder.path.iterdir() if was_empty else _small_files(folder)
      for path in written:
        if path.is_dir():
          shutil.rmtree(path)
        elif path.name != LOCK:
          path.unlink()
      for path, content in before.items():
        path.write_bytes(content)
    raise


def _small_files(folder: RunFolder) -> dict[Path, bytes]:
  """Returns the content of the files that a start writes and that do not grow with the steps."""
  growing = {LOCK, folder.log.name, folder.metrics.name, folder.evals.name}
  files = [path for path in folder.path.iterdir() if path.is_file() and path.name not in growing]
  return {path: path.read_bytes() for path in files}


def _has_trained(folder: RunFolder, start: int) -> bool:
  """Returns whether the run has recorded a step after `start`."""
  if not folder.metrics.exists():
    return False
  return any(record["step"] > start for record in read_records(folder.metrics))
