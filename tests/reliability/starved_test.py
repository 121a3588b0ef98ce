"""Out of room or rights: a clear word, nothing lost that was saved, and never a false success."""

import pytest

from benchmarks.reliability.starved import STEPS, campaign, can_mount

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("starved")
  if not can_mount(folder):
    pytest.skip("mounting a small file system needs rights that this user lacks")
  return campaign(folder / "folder")


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_until_there_is_room_again(outcomes):
  outcome = outcomes["disk full from step 12 to 20"]
  assert (
    "step 15 could not be saved, the newest checkpoint is of step 10: the disk lacks 1 MB for it"
    in outcome.said
  )
  assert outcome.status == 0 and outcome.same and outcome.kept == [STEPS - 5, STEPS]


@pytest.mark.slow
def test_a_disk_that_stays_full_is_no_success(outcomes):
  outcome = outcomes["disk full from step 12 on"]
  assert outcome.status == 1 and outcome.kept == [5, 10]
  assert (
    f"step {STEPS} of {STEPS} is not saved, the newest checkpoint is of step 10" in outcome.said
  )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["new run", "resume"])
def test_a_folder_without_rights_is_named(outcomes, command):
  outcome = outcomes[f"{command} in a read-only folder"]
  assert outcome.status == 2
  assert "disk/run': cannot be written to (Read-only file system)" in outcome.said
  assert outcome.kept == ([] if command == "new run" else [STEPS - 5])


@pytest.mark.slow
def test_the_folder_of_another_run_is_left_alone(outcomes):
  outcome = outcomes["new run in the folder of another"]
  assert outcome.status == 2 and outcome.same and outcome.kept == [STEPS - 5, STEPS]
  assert "run='whole': must be a new or empty folder" in outcome.said


@pytest.mark.slow
def test_a_run_has_one_writer(outcomes):
  refused, other = (
    outcomes[name] for name in ("resume of a run that another process writes", "that other process")
  )
  assert (
    refused.status == 2 and "run='shared': another process writes to it (process " in refused.said
  )
  assert other.status == 0 and other.same
