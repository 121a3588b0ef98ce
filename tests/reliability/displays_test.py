"""What only displays ends no run and costs no step: real streams, terminals and helpers."""

import signal

import pytest

from benchmarks.reliability.displays import STEPS, Outcome, redirected, without_helper
from benchmarks.reliability.displays import without_terminal as lose_terminal
from benchmarks.reliability.processes import write_corpus

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

FINE = Outcome(status=0, recorded=STEPS, saved=STEPS, reported=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("displays") / "folder"
  write_corpus(folder / "text")
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>/dev/null | head -1", "<&- >&- 2>&-"])
def test_streams_that_are_closed(folder, redirect):
  assert redirected(folder, f"run{len(redirect)}", redirect) == FINE


@pytest.mark.slow
def test_a_terminal_that_goes_away(folder):
  assert lose_terminal(folder, "terminal") == FINE


@pytest.mark.slow
def test_a_tracker_whose_helper_is_killed(folder):
  pytest.importorskip("wandb")
  assert without_helper(folder, "helper", signal.SIGKILL) == FINE
