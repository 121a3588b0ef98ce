"""A run that is killed at any moment ends as if it never had been, compiled as users get it."""

import pytest

from benchmarks.reliability.kills import SAVE_EVERY, campaign


@pytest.mark.slow
def test_a_run_killed_at_any_moment_loses_no_finished_checkpoint_and_ends_the_same(tmp_path):
  (chain,) = campaign(tmp_path, kills=6, seed=0)
  assert len(chain.kills) == 6
  for kill in chain.kills:
    assert kill.unsound == kill.lost == 0, kill
    assert kill.repeated <= 2 * SAVE_EVERY, (
      kill
    )  # those since the last finished save, and of the save under way
  assert chain.same
