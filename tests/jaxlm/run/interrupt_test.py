"""What asks a run to stop, in this process; real runs: tests/reliability/stop_test.py."""

import faulthandler
import signal

import pytest

from jaxlm.run.interrupt import KEYS, NOTICES, StopRequest, is_handled_in_c

SIGNALS = [getattr(signal, name) for name in (*KEYS, *NOTICES) if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_one_signal_asks_and_the_former_handlers_come_back(number):
  before = signal.getsignal(number)
  if before == signal.SIG_DFL and is_handled_in_c(number):
    pytest.skip("a library that other tests of this process load handles it")
  with StopRequest() as stop:
    assert not stop.reached(1) and stop.reason == ""
    signal.raise_signal(number)
    assert stop.reached(2) and stop.reason == number.name
  assert signal.getsignal(number) is before


def test_whatever_ends_a_process_without_being_its_fault_asks():
  """Others are faults, own timers, cannot be handled, or end nothing."""
  faults = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP", "SIGSTKFLT"}
  timers = {"SIGPROF", "SIGVTALRM", "SIGIO"}
  harmless = {"SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH"}
  ignored_by_python = {"SIGPIPE", "SIGXFSZ"}
  left = {
    *faults,
    *timers,
    *harmless,
    *ignored_by_python,
    "SIGKILL",
    "SIGSTOP",
    "SIGRTMIN",
    "SIGRTMAX",
  }
  names = {number.name for number in signal.Signals} - left
  assert names <= {*KEYS, *NOTICES}


def test_a_repeated_notice_asks_no_more_but_a_second_key_leaves_at_once():
  for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGQUIT)):
    with StopRequest() as stop:
      for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
      assert stop.reached(1)
      signal.raise_signal(first)
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(second)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_a_signal_that_is_ignored_or_handled_already_asks_nothing(handler):
  """As SIGHUP is under nohup, and SIGUSR2 in jobs of submitit."""
  before = signal.signal(signal.SIGHUP, handler)
  try:
    with StopRequest() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.reached(1)
    assert signal.getsignal(signal.SIGHUP) is handler
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_signal_that_a_library_handles_unknown_to_python_is_left_to_it(tmp_path):
  """As `faulthandler` does, which writes where this thread is."""
  with open(tmp_path / "threads", "w") as file:
    faulthandler.register(signal.SIGUSR2, file, all_threads=False)
    try:
      with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert not stop.reached(1)
      signal.raise_signal(signal.SIGUSR2)  # is handled still
    finally:
      faulthandler.unregister(signal.SIGUSR2)
  assert (tmp_path / "threads").read_text().count("most recent call first") == 2


def test_time_runs_out():
  with StopRequest(seconds=0) as stop:
    assert stop.reached(1) and stop.reason == "stop_after"
  with StopRequest(seconds=1000) as stop:
    assert not stop.reached(1)
