"""Asks a run to save and leave: on a key, on the notice of a cluster, or when its time is over.

Ctrl-C or Ctrl-\\ twice leaves at once. Clusters and terminals give notice by many signals, some of
them repeatedly; all of these mean the same request.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any, Self

import jax

from sharding.multihost import stop_together

KEYS = ("SIGINT", "SIGQUIT")
"""signals that a key sends; the second of them leaves at once"""
NOTICES = (
  "SIGTERM",  # of every cluster, container and shutdown
  "SIGHUP",  # a terminal or connection that goes away
  "SIGUSR1",  # of Slurm, SGE and LSF, as the job asks for them
  "SIGUSR2",
  "SIGXCPU",  # the soft limit of processor time
  "SIGALRM",  # `timeout --signal=ALRM`
  "SIGPWR",  # a power supply that ends; not on every system
)
"""signals that announce an end from outside

SIGPROF, SIGVTALRM and SIGIO are none of them: a process sends them to itself, as libtpu's profiler.
"""


class StopRequest:
  """Turns signals into a request to stop, while it is entered as a context manager.

  A second key raises KeyboardInterrupt. Signals that the process ignores, as SIGHUP under `nohup`,
  and those that another part of it handles, be it a C library, are left alone, but for keys and
  SIGTERM.
  """

  def __init__(self, seconds: float = math.inf) -> None:
    self.reason = ""
    """what asked for the stop; empty while nothing did"""
    self._deadline = time.monotonic() + seconds
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    # In other threads, such as a notebook's, Python forbids handlers.
    if threading.current_thread() is not threading.main_thread():
      return self
    for name in (*KEYS, *NOTICES):
      number = getattr(signal, name, None)
      if number is not None and self._takes_over(number):
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      if handler is not None:  # jax's runtime set it, not Python, which cannot set it again
        signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Returns whether to stop before `step`: the same in all processes, which all ask each time."""
    if not self.reason and time.monotonic() >= self._deadline:
      self.reason = "stop_after"
    return stop_together(step, bool(self.reason))

  def _takes_over(self, number: signal.Signals) -> bool:
    if number.name in KEYS:
      return True
    if number == signal.SIGTERM:
      # With several processes it is left to the runtime's own handler, which tells the others.
      return jax.process_count() == 1
    return signal.getsignal(number) == signal.SIG_DFL and not is_handled_in_c(number)

  def _handle(self, number: int, frame: Any) -> None:
    name = signal.Signals(number).name
    if name in KEYS and self.reason in KEYS:
      raise KeyboardInterrupt
    self.reason = name


def is_handled_in_c(number: signal.Signals) -> bool:
  """Returns whether the system has a handler for a signal (Linux; elsewhere False).

  Python knows nothing of those that libraries install, such as `faulthandler`'s.
  """
  try:
    status = Path("/proc/self/status").read_text()
  except OSError:
    return False
  caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
  return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
