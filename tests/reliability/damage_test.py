"""Damage to a checkpoint is noticed wherever it is, named, passed over and kept."""

import re
from pathlib import Path

import pytest

from benchmarks.reliability.damage import (
  KINDS,
  SAVE_EVERY,
  STEPS,
  campaign,
  damaged,
  resumed,
  trained,
)
from benchmarks.reliability.processes import finish, run, start_python
from jaxlm.checkpoint.folder import checkpoint_path, set_aside
from jaxlm.checkpoint.manifest import PIECE, verify, write_manifest
from jaxlm.cli import main

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return trained(tmp_path_factory.mktemp("damage") / "folder")


@pytest.mark.slow
def test_every_kind_of_damage_at_every_place_is_named_and_the_older_checkpoint_found(whole):
  cases = campaign(whole)
  assert {case.kind for case in cases} == set(KINDS) and len(cases) > 50
  assert [case for case in cases if not (case.named and case.older_used)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a flipped bit", "missing"])
def test_a_resumed_run_goes_on_from_before_the_damage_and_keeps_it(whole, kind):
  assert resumed(whole.path.parent, whole, kind)


@pytest.mark.slow
def test_verify_says_it_from_the_command_line_and_starts_nothing(whole, tmp_path, capsys):
  newest = checkpoint_path(whole.checkpoints, STEPS)
  assert main(["checkpoint", "verify", str(whole.path)]) == 0
  assert re.fullmatch(
    r"step 3: sound, 0.\d+ MB\nstep 6: sound, 0.\d+ MB\n", capsys.readouterr().out
  )
  with damaged(newest, "emptied", newest / "params" / "_METADATA"):
    script = f"import sys, jaxlm.cli; words = ['checkpoint', 'verify', {str(whole.path)!r}]; "
    script += "status = jaxlm.cli.main(words); "
    script += "sys.exit('jax' if 'jax' in sys.modules else status)"
    status, printed = finish(tmp_path, start_python(tmp_path, "-c", script))
  assert status == 1, printed
  assert "step 6: does not verify\n  params/_METADATA: size 0, the manifest says" in printed
  assert "would go on from step 3" in printed
  both = [checkpoint_path(whole.checkpoints, step) for step in (STEPS - SAVE_EVERY, STEPS)]
  with (
    damaged(both[0], "missing", both[0] / "manifest.json"),
    damaged(both[1], "missing", both[1] / "manifest.json"),
  ):
    assert main(["checkpoint", "verify", str(whole.path)]) == 1
  assert "no checkpoint verifies" in capsys.readouterr().out


@pytest.mark.slow
def test_show_lists_steps_sizes_configuration_and_arrays(whole, capsys):
  assert main(["checkpoint", "show", str(whole.path)]) == 0
  shown = capsys.readouterr().out
  for line in ("step 3: 0.", "step 6: 0.", "  model.D = 16\n", "  ema = 0.9\n"):
    assert line in shown
  assert re.search(r"^  float32\[256, 16\] +params/embed/weight$", shown, re.MULTILINE)
  assert re.search(r"^  float32\[256, 16\] +ema/embed/weight$", shown, re.MULTILINE)
  assert "learning_rate = 0.001" not in shown  # a default


@pytest.mark.slow
def test_a_run_that_nobody_can_resume_says_so_and_stays_as_it_is(whole):
  both = [checkpoint_path(whole.checkpoints, step) for step in (STEPS - SAVE_EVERY, STEPS)]
  with damaged(both[0], "emptied", both[0] / "_CHECKPOINT_METADATA"):
    with damaged(both[1], "emptied", both[1] / "_CHECKPOINT_METADATA"):
      status, printed = run(whole.path.parent, "resume", "whole", "--steps", "9")
  assert (
    status == 1
    and "holds no checkpoint that verifies" in printed
    and "_CHECKPOINT_METADATA: size 0" in printed
  )
  assert set_aside(whole.checkpoints) == []


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts bytes read")
def test_verifying_reads_every_byte_once(tmp_path):
  """So that it costs a fraction of restoring; benchmarks/results/reliability.md has the times."""
  size = 3 * PIECE + 12345
  (tmp_path / "array").write_bytes(bytes(size))
  write_manifest(tmp_path)
  before = bytes_read()
  assert verify(tmp_path) == []
  assert size <= bytes_read() - before < size + 10_000  # and the manifest


def bytes_read() -> int:
  """Returns how many bytes this process has read from files, cached or not."""
  lines = Path("/proc/self/io").read_text().splitlines()
  return int(dict(line.split(": ") for line in lines)["rchar"])
