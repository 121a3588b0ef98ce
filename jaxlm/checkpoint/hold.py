"""Keeps the process that writes a run from pruning a checkpoint while another one reads it.

A reader holds a shared lock on the checkpoint's manifest, and a writer prunes only what it can lock
alone; it prunes the rest after its next save. The kernel drops the lock of a process that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoint.manifest import NAME, verify

_log = logging.getLogger("jaxlm")


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
  """Holds a checkpoint folder; gives whether it is still there, finished or not.

  Where the file system has no locks, nothing is held.
  """
  try:
    file = open(path / NAME, "rb")
  except OSError:  # it has no manifest, so nobody prunes it, or it has gone
    yield path.exists()
    return
  with file:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_SH)
    yield _is_same(path / NAME, file.fileno())


@contextlib.contextmanager
def held_alone(path: Path) -> Iterator[bool]:
  """Gives whether nobody else holds a checkpoint folder, and lets nobody hold it meanwhile."""
  try:
    file = open(path / NAME, "rb+")  # for writing, which locks over a network need
  except OSError:
    yield True
    return
  with file:
    alone = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      alone = False
    except OSError:  # no locks here
      pass
    yield alone


def verify_held(path: Path, warned: set[str]) -> bool:
  """Returns whether a held checkpoint verifies; logs once what is wrong with it."""
  if faults := verify(path):
    message = f"checkpoint {path.name} does not verify: {'; '.join(faults)}"
    if message not in warned and path.exists():
      _log.warning("%s", message)
    warned.add(message)
  return not faults


def _is_same(path: Path, file: int) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(file))
  except FileNotFoundError:
    return False
