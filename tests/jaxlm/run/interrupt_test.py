"""What asks a run to stop, in this process; real runs: tests/reliability/stop_test.py."""

import signal

import pytest

from jaxlm.run.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_and_the_former_handlers_come_back(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert not stop.reached(1) and stop.reason == ""
    signal.raise_signal(number)
    assert stop.reached(2) and stop.reason == number.name
  assert signal.getsignal(number) is before


def test_a_repeated_notice_asks_no_more_but_a_second_ctrl_c_leaves_at_once():
  with StopRequest() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    assert stop.reached(1)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_time_runs_out():
  with StopRequest(seconds=0) as stop:
    assert stop.reached(1) and stop.reason == "stop_after"
  with StopRequest(seconds=1000) as stop:
    assert not stop.reached(1)
