"""Ctrl-C once asks the loop to save and leave; twice leaves at once."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self


class StopRequest:
  """A context manager; `requested` turns true at the first SIGINT or SIGTERM."""

  def __init__(self) -> None:
    self.requested = False
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # elsewhere, a notebook's thread say, Python forbids it
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    if self.requested:
      raise KeyboardInterrupt
    self.requested = True
