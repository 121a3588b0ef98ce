"""A failure in one process is told to the others, which then end instead of waiting for it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src import distributed

from pallas_kernels.common.errors import UserError
from sharding import failure
from sharding.failure import Attempt, end_together

pytestmark = pytest.mark.filterwarnings(  # of the thread that stands for a process which leaves
  "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


class Store:
  """Stands for the client of a coordination service of this process and one that never answers."""

  def __init__(self):
    self.values = {}
    self.barriers = []

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.values and not allow_overwrite:
      raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
    self.values[key] = value

  def key_value_try_get(self, key):
    if key not in self.values:
      raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
    return self.values[key]

  def key_value_dir_get(self, folder):
    return [item for item in self.values.items() if item[0].startswith(folder)]

  def wait_at_barrier(self, key, timeout_ms):
    self.barriers.append(key)
    time.sleep(timeout_ms / 1000)
    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def store(monkeypatch) -> Store:
  jax.devices()  # jax would hand the client on to its backend
  store = Store()
  monkeypatch.setattr(distributed.global_state, "client", store)
  monkeypatch.setattr(failure, "GRACE", 0.0)
  monkeypatch.setattr(failure, "_EVERY", 0.02)
  return store


@pytest.fixture
def exited(monkeypatch) -> tuple[threading.Event, list[int]]:
  event, statuses = threading.Event(), []

  def leave(status):
    statuses.append(status)
    event.set()
    raise SystemExit  # ends the thread

  monkeypatch.setattr(failure.os, "_exit", leave)
  return event, statuses


@pytest.mark.parametrize(("error", "status"), [(OSError("disk"), 1), (UserError("flag"), 2)])
def test_a_failure_is_told_and_ends_the_process(store, exited, capsys, error, status):
  with pytest.raises(type(error)), end_together():
    raise error
  assert exited[0].wait(5) and exited[1] == [status]
  told = f"failed: {type(error).__name__}: {error}; this process ends with it"
  printed = capsys.readouterr().err
  assert "jaxlm: process 0 of 1" in printed and told in printed


def test_a_failure_elsewhere_ends_this_process_too(store, exited, capsys):
  with end_together():
    store.key_value_set(failure._FAILURE, "1 process 1 of 2 on host1 failed: OSError: disk full")
    assert exited[0].wait(5) and exited[1] == [1]
  assert "process 1 of 2 on host1 failed: OSError: disk full" in capsys.readouterr().err


def test_a_process_that_falls_silent_ends_the_others(store, exited, capsys, monkeypatch):
  monkeypatch.setattr(failure, "SILENCE", 0.3)
  with end_together():
    store.values[f"{failure._ALIVE}/1"] = failure._DONE  # it may be silent
    for beat in range(10):  # longer than the silence
      store.values[f"{failure._ALIVE}/2"] = str(beat)
      assert not exited[0].wait(0.06)
    assert exited[0].wait(5) and exited[1] == [1]
  assert "process 2 of 1 is gone: nothing was heard of it" in capsys.readouterr().err


def test_without_a_failure_nothing_is_told_and_nobody_watches_afterwards(store, exited):
  with end_together():
    time.sleep(0.1)
  assert store.values == {f"{failure._ALIVE}/0": "done"} and exited[1] == []
  assert not any(thread.name == "failure" for thread in threading.enumerate())


ABORTS = """
import os
from sharding.failure import ExplainedAborts
other = ExplainedAborts(lambda: "wrong")
other.remove()
aborts = ExplainedAborts(lambda: {message!r})
os.abort()
"""


@pytest.mark.parametrize(
  ("message", "status"), [("process 0 of 2 is gone", 1), ("", -signal.SIGABRT)]
)
def test_an_abort_ends_the_process_with_its_explanation_if_there_is_one(message, status):
  script = ABORTS.format(message=message)
  ended = subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == status
  assert ended.stderr == (f"jaxlm: {message}\n" if message else "")


def test_an_abort_is_explained_where_the_coordinator_does_not_answer(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with socket.create_server(("localhost", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
    monkeypatch.setattr(distributed.global_state, "coordinator_address", address)
    assert failure._explain_abort() == ""
  assert "process 0 of 1, which coordinates the others, is gone" in failure._explain_abort()
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  assert failure._explain_abort() == ""


def test_an_attempt_that_another_process_gives_up_fails_at_once(store):
  attempt = Attempt()
  attempt.give_up("disk full")
  attempt.give_up("again")  # the first reason stays
  began = time.monotonic()
  with pytest.raises(OSError, match="process 0: disk full"):
    attempt.wait_for_all("saved", timeout_ms=5000)
  assert time.monotonic() - began < 2
  with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE"):  # the next one starts anew
    Attempt().wait_for_all("saved", timeout_ms=50)
  first, second = store.barriers
  assert first != second  # the first is still open


def test_a_process_alone_waits_for_nobody(monkeypatch):
  monkeypatch.setattr(distributed.global_state, "client", None)
  Attempt().wait_for_all("saved", timeout_ms=5000)
