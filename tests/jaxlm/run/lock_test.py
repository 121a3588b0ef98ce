"""One writer to a run's folder at a time."""

import os

import pytest

from benchmarks.reliability.processes import finish, start_python
from jaxlm.run.lock import only_writer


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
  with only_writer(tmp_path / "run"):
    with pytest.raises(
      ValueError, match=rf"run='.*run': another process writes to it \(process {os.getpid()} on "
    ):
      with only_writer(tmp_path / "run"):
        pass
  assert not (tmp_path / "run").exists()
  with only_writer(tmp_path / "run"):
    pass


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path):
  script = "import os, sys; from pathlib import Path; from jaxlm.run.lock import _take_lock; "
  script += "_take_lock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
  process = start_python(tmp_path, "-c", script, str(tmp_path))
  assert finish(tmp_path, process)[0] == -9
  assert "process" in (tmp_path / "lock").read_text()
  with only_writer(tmp_path):
    assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_lock_file_that_its_owner_removed_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
  """The former owner ends between opening and locking: the new one locks a file that is there."""
  import fcntl

  flock, calls = fcntl.flock, []

  def late(file, operation):
    if not calls:
      (tmp_path / "lock").unlink()
    calls.append(flock(file, operation))

  monkeypatch.setattr(fcntl, "flock", late)
  with only_writer(tmp_path):
    assert len(calls) == 2 and (tmp_path / "lock").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"run='.*file': cannot be written to \(File exists\)"):
    with only_writer(tmp_path / "file"):
      pass


def test_of_folders_that_stay_empty_only_those_that_were_there_are_left(tmp_path):
  (tmp_path / "mine").mkdir()
  for path in ("mine", "new", "several/new/ones"):
    with only_writer(tmp_path / path):
      assert (tmp_path / path / "lock").exists()
  assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
  with only_writer(tmp_path / "used"):
    (tmp_path / "used/config.json").write_text("{}")
  assert (tmp_path / "used/config.json").exists()
