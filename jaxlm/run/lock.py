"""Lets one process at a time write to a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxlm.run.run_folder import LOCK
from pallas_kernels.common.errors import UserError
from sharding.multihost import run_on_main_process

_log = logging.getLogger("jaxlm")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
  """Holds the lock of a run's folder, which is made if need be, in the main process of the run.

  The file `lock` names the owner's host and process. The kernel forgets the lock of a process that
  dies, however it dies, so a file that a killed process left behind holds nobody up. Of folders
  that were made here and into which nothing was written, none is left. Raises UserError where
  another process has the lock or the folder cannot be written to.
  """
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  files: list[IO[str]] = []
  run_on_main_process(lambda: files.append(_take_lock(folder)))
  try:
    yield
  finally:
    for file in files:
      with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
      file.close()
      with contextlib.suppress(OSError):  # the first that is not empty ends it
        for path in missing:
          path.rmdir()


def _take_lock(folder: Path) -> IO[str]:
  """Opens, locks and returns the lock file, with this process's name in it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+")
    _lock(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
  except FileNotFoundError:  # a process that was refused removed the folder meanwhile
    return _take_lock(folder)
  except BlockingIOError:
    file.seek(0)
    owner = file.read().strip()
    raise UserError(f"run={str(folder)!r}: another process writes to it ({owner})") from None
  except OSError as error:
    raise UserError(f"run={str(folder)!r}: cannot be written to ({error.strerror})") from error
  try:
    if os.path.samestat(os.stat(folder / LOCK), os.fstat(file.fileno())):
      return file
  except FileNotFoundError:
    pass
  file.close()  # its former owner removed it between our opening and locking it
  return _take_lock(folder)


def _lock(file: IO[str]) -> None:
  """Locks an open file without waiting; raises BlockingIOError where another process has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
      raise
    _log.warning(
      "%s: the file system has no locks, so nothing keeps a second process from this run", file.name
    )
