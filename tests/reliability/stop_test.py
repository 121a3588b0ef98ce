"""A run that is asked to stop saves, says that it can be resumed, and how."""

import pytest

from benchmarks.reliability.processes import write_corpus
from benchmarks.reliability.stops import by_clock, by_signals, resumed, second_of_two, twice
from jaxlm.cli import RESUMABLE

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Of all runs here, so that they share compiled programs."""
  folder = tmp_path_factory.mktemp("stop") / "folder"
  write_corpus(folder / "text")
  return folder


@pytest.mark.slow
def test_sigterm_saves_and_says_that_the_run_can_be_resumed_however_often_it_comes(folder):
  stop = by_signals(folder, "SIGTERM", "SIGTERM", "SIGTERM")
  assert stop.statuses == (RESUMABLE,), stop.printed
  assert f"stopped and saved at step {stop.last} of 100000 (SIGTERM)" in stop.printed
  assert "go on with: jaxlm resume SIGTERM" in stop.printed and stop.saved == stop.last >= 3
  assert not (folder / "SIGTERM/lock").exists()


@pytest.mark.slow
def test_a_limit_of_time_does_the_same_and_holds_for_each_process_that_resumes(folder):
  stop = by_clock(folder)
  assert stop.statuses == (RESUMABLE,) and stop.saved == stop.last > 0, stop.printed
  assert f"stopped and saved at step {stop.last} of 100000 (stop_after)" in stop.printed
  again = resumed(folder, "clock")
  assert again.statuses == (RESUMABLE,) and f"resuming at step {stop.last}" in again.printed
  assert again.saved == again.last > stop.last and again.seconds > 10


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_though_a_checkpoint_is_being_written(folder):
  stop = twice(folder)
  assert stop.statuses == (1,) and stop.saved == -1 and stop.seconds < 5
  assert "jaxlm: left at once, without saving" in stop.printed and "Traceback" not in stop.printed
  again = resumed(folder, "twice", "--steps", "4")
  assert again.statuses == (0,) and again.saved == 4
  assert "twice ended before its first checkpoint: it begins again at step 0" in again.printed


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "--stop_after"])
def test_two_processes_stop_at_the_same_step_whichever_of_them_is_asked(folder, how):
  stop = second_of_two(folder, how, "10s")
  assert stop.statuses == (RESUMABLE, RESUMABLE), stop.printed
  assert (
    f"stopped and saved at step {stop.last} of 100000" in stop.printed and stop.saved == stop.last
  )
