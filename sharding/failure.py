"""Tells all processes of a run of a failure in one of them, so that none waits for it for ever."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the key-value store that all processes share

from pallas_kernels.common.errors import UserError

GRACE = 10.0
"""seconds that a process has, after the first failure, to end by itself"""
SILENCE = 45.0
"""seconds after which a process that has not been heard of counts as gone; jax waits about 85"""
_EVERY = 2.0
_FAILURE = "jaxlm/failure"
_ALIVE = "jaxlm/alive"
_DONE = "done"


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """Ends this process, with a message, within about `GRACE` seconds after any process fails.

  A process that is killed cannot tell. Those fail that miss it in a collective, or the main process
  tells after `SILENCE` seconds. If it is the main process itself, jax aborts the others as soon as
  their connection to it breaks, or after it has missed heartbeats, and they say why.
  """
  ended = threading.Event()
  aborts = ExplainedAborts(_explain_abort)
  watcher = threading.Thread(target=_Watcher(ended).run, daemon=True, name="failure")
  watcher.start()
  try:
    yield
  except BaseException as error:
    lost = isinstance(error, jax.errors.JaxRuntimeError)
    what = "cannot reach another one, or its device failed" if lost else "failed"
    who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    first_line = str(error).partition("\n")[0]
    status = 2 if isinstance(error, UserError) else 1
    _tell(f"{status} {who} {what}: {type(error).__name__}: {first_line}")
    raise  # the watcher goes on: an orderly shutdown of jax would wait for all processes
  ended.set()
  watcher.join()
  aborts.remove()


def _tell(message: str) -> None:
  """Tells all processes of a failure, unless they know of one already."""
  client: Any = distributed.global_state.client
  with contextlib.suppress(Exception):  # told already, or the coordinator is gone
    client.key_value_set(_FAILURE, message)


class ExplainedAborts:
  """Ends this process with a message of our own where jax aborts it.

  jax aborts a process that has lost the coordinator, or has waited for it in vain, by SIGABRT in a
  thread of its own in C++, which no exception and no handler of Python's `signal` module reaches.
  """

  def __init__(self, explain: Callable[[], str]):
    """Handles aborts from now on; one that `explain` returns no message for is left as it is."""

    def end(number: int) -> None:
      if message := explain():
        os.write(2, f"jaxlm: {message}\n".encode())
        os._exit(1)
      self.remove()  # and the abort goes on

    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    self._before = _set_handler(ctypes.cast(self._handler, ctypes.c_void_p))

  def remove(self) -> None:
    """Leaves aborts to the handler that was there before."""
    _set_handler(self._before)


def _set_handler(handler: Any) -> Any:
  """Sets what C does at SIGABRT, and returns what it did before."""
  c_signal = ctypes.CDLL(None).signal
  c_signal.argtypes, c_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  return c_signal(signal.SIGABRT, handler)


def _explain_abort() -> str:
  """Returns that process 0 is gone, or "" where it is not or is this one."""
  if jax.process_index() == 0:
    return ""
  host, _, port = (distributed.global_state.coordinator_address or ":0").rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError:
    who = f"process 0 of {jax.process_count()}, which coordinates the others,"
    return f"{who} is gone; this process ends with it"
  return ""


class _Watcher:
  """Shows others that this process lives, and ends it soon after one of them has failed."""

  def __init__(self, ended: threading.Event):
    self.client: Any = distributed.global_state.client
    self.ended = ended
    self.index, self.processes = jax.process_index(), jax.process_count()
    self.heard: dict[str, tuple[str, float]] = {}
    """key of a process: the last that it has shown, and when"""

  def run(self) -> None:
    """Watches until this process has ended what it does together with the others."""
    beats = 0
    while not self.ended.wait(_EVERY):
      self.show(str(beats))
      beats += 1
      if self.index == 0:
        self.look_for_silence(time.monotonic())
      if told := self.told():
        # the coordinator leaves last: without it, jax ends the others before they print
        if not self.ended.wait(GRACE + 2 * _EVERY * (self.index == 0)):
          status, _, message = told.partition(" ")
          print(f"jaxlm: {message}; this process ends with it", file=sys.stderr, flush=True)
          sys.stdout.flush()
          os._exit(int(status))
        break
    self.show(_DONE)

  def told(self) -> str:
    """Returns the status and message of the first failure, or ""."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has failed
      return self.client.key_value_try_get(_FAILURE)
    return ""

  def show(self, value: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # jax notices it too, and says so
      self.client.key_value_set(f"{_ALIVE}/{self.index}", value, allow_overwrite=True)

  def look_for_silence(self, now: float) -> None:
    """Tells of a process that has shown nothing new for `SILENCE` seconds."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      for key, value in self.client.key_value_dir_get(_ALIVE):
        if key not in self.heard or value != self.heard[key][0]:
          self.heard[key] = (value, now)
        elif value != _DONE and now - self.heard[key][1] > SILENCE:
          index = key.rpartition("/")[2]
          who = f"process {index} of {self.processes}"
          _tell(f"1 {who} is gone: nothing was heard of it for {SILENCE:.0f} seconds")


class Attempt:
  """Lets processes try something in the background, which fails in all where it fails in one.

  All processes make the same attempts in the same order.
  """

  _numbers = itertools.count()

  def __init__(self) -> None:
    self._client: Any = distributed.global_state.client
    self._key = f"jaxlm/attempt/{next(self._numbers)}"

  def give_up(self, reason: str) -> None:
    """Tells all processes that this one has failed, and why."""
    if self._client is not None:
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has told before
        self._client.key_value_set(self._key, f"process {jax.process_index()}: {reason}")

  def wait_for_all(self, key: str, timeout_ms: int) -> None:
    """Waits until every process has come to the barrier `key`; raises OSError where one gave up.

    A barrier that one process gave up stays open, so the next attempt has one of its own.
    """
    if self._client is None:
      return
    errors: list[jax.errors.JaxRuntimeError] = []

    def wait() -> None:
      try:
        self._client.wait_at_barrier(f"{self._key}/{key}", timeout_ms)
      except jax.errors.JaxRuntimeError as error:
        errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True, name="barrier")
    waiting.start()
    while waiting.is_alive():
      waiting.join(_EVERY / 2)
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has given up
        raise OSError(self._client.key_value_try_get(self._key))
    if errors:
      raise errors[0]
