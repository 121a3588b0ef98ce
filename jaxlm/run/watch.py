"""Reports what a run is waiting for when a step takes far longer than those before it."""

from __future__ import annotations

import collections
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Self

ACTIVITIES = {
  "start": "the start of the run",
  "data": "the data loader",
  "compile": "the compiler",
  "device": "the devices",
  "checkpoint": "the checkpoint to be read or written",
  "evaluation": "the evaluation",
  "trackers": "the trackers",
}


class Watch:
  """Reports a run that has stopped moving; a context manager around the training loop.

  `set_activity` states what the main thread does from now on, `step_done` that a step has ended.
  Calls `print_status` with a line when no step ends for `FACTOR` times the median of the last
  steps (at least `LEAST` seconds), when a compilation takes `COMPILING` seconds, and again
  whenever the wait has doubled.
  """

  FACTOR = 10.0
  LEAST = 10.0
  COMPILING = 20.0
  EVERY = 0.5  # seconds between looks

  def __init__(self, print_status: Callable[[str], None]):
    self.print_status = print_status
    self._activity, self._since = "start", time.perf_counter()
    self._last_step = self._since
    self._steps = collections.deque[float](maxlen=32)  # seconds of the last steps
    self._spent = collections.defaultdict[str, float](float)
    self._patience = 1.0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

  def __enter__(self) -> Self:
    self._thread.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._ended.set()
    self._thread.join()

  def set_activity(self, activity: str) -> None:
    """States what is being waited for from now on: a key of `ACTIVITIES`."""
    now = time.perf_counter()
    self._spent[self._activity] += now - self._since
    self._activity, self._since = activity, now
    if activity == "compile":
      self._patience = 1.0

  def pop_seconds(self, activity: str) -> float:
    """Returns the seconds spent in this activity since it was last asked for."""
    return self._spent.pop(activity, 0.0)

  def step_done(self, seconds: float) -> None:
    """Records that a step has ended, and how long it took."""
    self._steps.append(seconds)
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves what has happened since the last step out of the wait for the next one."""
    self._last_step, self._patience = time.perf_counter(), 1.0

  def median(self) -> float:
    """Returns the median seconds of the last steps."""
    return statistics.median(self._steps)

  def _run(self) -> None:
    while not self._ended.wait(self.EVERY):
      if line := self._describe_wait(time.perf_counter()):
        self._patience *= 2
        self.print_status(line)

  def _describe_wait(self, now: float) -> str:
    """Returns the line to print at this time, or nothing."""
    if self._activity == "compile":
      waited = now - self._since
      return (
        f"compiling for {waited:.0f} s so far" if waited > self._patience * self.COMPILING else ""
      )
    waited = now - self._last_step
    if len(self._steps) < 3:
      return ""
    usual = self.median()
    if waited <= self._patience * max(self.LEAST, self.FACTOR * usual):
      return ""
    activity = ACTIVITIES[self._activity]
    return f"no step for {waited:.1f} s (median {usual:.2f} s): waiting for {activity}"
