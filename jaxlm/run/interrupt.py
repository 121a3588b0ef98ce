"""Asks a run to save and leave: on Ctrl-C, on the notice of a cluster, or when its time is over.

Ctrl-C twice leaves at once. Clusters give notice by SIGTERM, some of them repeatedly; all of these
mean the same request.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any, Self

import jax

from sharding.multihost import stop_together


class StopRequest:
  """Turns signals into a request to stop, while it is entered as a context manager.

  A second SIGINT raises KeyboardInterrupt.
  """

  def __init__(self, seconds: float = math.inf) -> None:
    self.reason = ""
    """what asked for the stop; empty while nothing did"""
    self._deadline = time.monotonic() + seconds
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    # With several processes, SIGTERM is left to the runtime's own handler, which tells the others.
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    # In other threads, such as a notebook's, Python forbids handlers.
    if threading.current_thread() is threading.main_thread():
      for number in numbers:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Returns whether to stop before `step`: the same in all processes, which all ask each time."""
    if not self.reason and time.monotonic() >= self._deadline:
      self.reason = "stop_after"
    return stop_together(step, bool(self.reason))

  def _handle(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self.reason == "SIGINT":
      raise KeyboardInterrupt
    self.reason = signal.Signals(number).name
