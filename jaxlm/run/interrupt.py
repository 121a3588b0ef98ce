"""When a run is asked to save and leave: Ctrl-C once, the notice of a cluster, or the end of its time.

Ctrl-C twice leaves at once. Clusters give notice by SIGTERM, some repeatedly; they all mean the same request.
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
  """A context manager in which signals only set `reason`; a second SIGINT raises KeyboardInterrupt."""

  def __init__(self, seconds: float = math.inf) -> None:
    self.reason = ""
    """what asked for the stop; empty while nothing did"""
    self._deadline = time.monotonic() + seconds
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    # of several processes, SIGTERM reaches the runtime's own handler, which tells the others
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    if (
      threading.current_thread() is threading.main_thread()
    ):  # elsewhere, a notebook's thread say, Python forbids it
      for number in numbers:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Whether to stop before this step; ask once before each. Several processes stop at the same step."""
    if not self.reason and time.monotonic() >= self._deadline:
      self.reason = "stop_after"
    return stop_together(step, bool(self.reason))

  def _handle(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self.reason == "SIGINT":
      raise KeyboardInterrupt
    self.reason = signal.Signals(number).name
