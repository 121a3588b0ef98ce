"""One process at a time writes to a run's folder."""

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

  The file `lock` names the owner's host and process. The kernel forgets the lock of a process that dies, however it
  dies, so a file that a killed process left behind holds nobody up. Raises ValueError where another process has the
  lock or the folder cannot be written to.
  """
  held: list[IO[str]] = []

  def take() -> int:
    held.append(_take(folder))
    return 0

  run_on_main_process(take)
  try:
    yield
  finally:
    for file in held:
      with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
      file.close()


def _take(folder: Path) -> IO[str]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+")
    _lock(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
  except BlockingIOError:
    file.seek(0)
    raise UserError(
      f"run={str(folder)!r}: another process writes to it ({file.read().strip()})"
    ) from None
  except OSError as error:
    raise UserError(f"run={str(folder)!r}: cannot be written to ({error.strerror})") from error
  try:
    if os.path.samestat(os.stat(folder / LOCK), os.fstat(file.fileno())):
      return file
  except FileNotFoundError:
    pass
  file.close()  # its former owner removed it between our opening and locking it
  return _take(folder)


def _lock(file: IO[str]) -> None:
  """Raises BlockingIOError where it is locked."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
      raise
    _log.warning(
      "%s: the file system has no locks, so nothing keeps a second process from this run", file.name
    )
