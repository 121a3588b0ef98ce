"""Signals of clusters and terminals save; those that announce no end are none."""

import pytest

from benchmarks.reliability.notices import NOHUP, told
from benchmarks.reliability.processes import write_corpus
from jaxlm.cli import RESUMABLE

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("notices") / "folder"
  write_corpus(folder / "text")
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_notice_saves_everything_and_says_resumable(folder, name):
  """Every signal in one process: tests/jaxlm/run/interrupt_test.py."""
  notice = told(folder, name, name)
  assert notice.status == RESUMABLE and notice.lost == 0, notice.printed
  assert notice.is_resumable and f"({name})" in notice.printed


@pytest.mark.slow
def test_nohup_and_a_stopped_terminal_let_a_run_go_on(folder):
  notice = told(folder, "on", "SIGHUP", "SIGTSTP", "SIGCONT", "SIGTERM", setup=NOHUP)
  assert notice.status == RESUMABLE and notice.lost == 0, notice.printed
  assert "(SIGTERM)" in notice.printed
