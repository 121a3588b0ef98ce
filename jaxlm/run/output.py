"""Lets a run go on whatever becomes of its terminal: closed, gone, full, or of another encoding.

Imports no jax.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

_log = logging.getLogger("jaxlm")


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
  """Lets nothing that is printed inside raise; what stdout or stderr do not take is dropped.

  Also a decorator. The first line that is dropped is logged.
  """
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before


class _Forgiving:
  """A stream like the one it writes to, whose `write` and `flush` never raise."""

  def __init__(self, stream: TextIO | None):
    self._stream: TextIO = open(os.devnull, "w") if stream is None else stream
    self._refused = False

  def write(self, text: str) -> int:
    """Writes text; letters that the encoding lacks are written as escapes."""
    try:
      self._stream.write(text)
    except UnicodeEncodeError:
      encoding = self._stream.encoding
      self.write(text.encode(encoding, "backslashreplace").decode(encoding))
    except (OSError, ValueError) as error:  # ValueError: it was closed by this process
      self._report(error)
    return len(text)

  def flush(self) -> None:
    """Flushes the stream; a full disk may take later what it refuses here."""
    try:
      self._stream.flush()
    except (OSError, ValueError) as error:
      self._report(error)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _report(self, error: Exception) -> None:
    if not self._refused:
      self._refused = True
      name = getattr(self._stream, "name", "the terminal")
      _log.warning("%s takes no more lines (%s); the run goes on", name, error)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
  """Surrounds a whole program, so that its exit status is its own whatever its streams do.

  Opens those of stdin, stdout and stderr that are closed onto the null device: otherwise the next
  file that is opened takes their number, and what a library prints lands in it. Letters that the
  encoding of stdout lacks are written as escapes. At the end, output that cannot be written is
  dropped, where Python would leave with status 120. Also a decorator.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
  if sys.stdout is None:
    sys.stdout = open(os.devnull, "w")
  if sys.stderr is None:
    sys.stderr = open(os.devnull, "w")
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself
  try:
    yield
  finally:
    _flush_or_drop()


def leave_at_once(status: int) -> NoReturn:
  """Ends the process with this status and without what Python and libraries do at its end."""
  _flush_or_drop()
  os._exit(status)


def _flush_or_drop() -> None:
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
