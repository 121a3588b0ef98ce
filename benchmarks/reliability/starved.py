"""A run whose disk is full, read-only or taken: what it says, what it keeps, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.reliability.comparison import last_step, same_end
from benchmarks.reliability.processes import SMALL, finish, run, start, wait_until, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.checkpoint.manifest import verify
from jaxlm.run.run_folder import RunFolder

STEPS = 30
FLAGS = [*SMALL, "--steps", str(STEPS), "--save_every", "5", "--eval_every", "15"]
# so that there is time to take its disk away: each step waits a little
SLOWER = """
import time
import jaxlm.run.metrics as metrics
whole = metrics.Reporter.step
def step(self, *args, **kwargs):
  time.sleep(0.05)
  return whole(self, *args, **kwargs)
metrics.Reporter.step = step
"""


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
  """Mounts a file system of its own, which needs the rights to."""
  folder.mkdir(exist_ok=True)
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
    check=True,
    capture_output=True,
  )
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
  try:
    with small_disk(folder / "probe", 1):
      return True
  except (OSError, subprocess.CalledProcessError):
    return False


def fill(disk: Path) -> Path:
  """Writes a file that leaves no byte free."""
  filler = disk / "filler"
  with open(filler, "ab", buffering=0) as file:
    for size in (1 << 20, 1 << 12, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))
  return filler


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Says how a command ended that had no room or no right."""

  status: int
  said: str
  """the lines that matter"""
  kept: list[int]
  """steps whose checkpoints verify"""
  same: bool
  """the run has the curve and the final state of one that had room"""


def campaign(folder: Path) -> dict[str, Outcome]:
  """Causes every shortage once; needs the rights to mount file systems."""
  write_corpus(folder / "text")
  status, printed = run(folder, "train", "micro", *FLAGS, "--run", "whole")
  assert status == 0, printed
  whole = RunFolder(folder / "whole")
  return {
    "disk full from step 12 to 20": _full_disk(folder, whole, freed=True),
    "disk full from step 12 on": _full_disk(folder, whole, freed=False),
    "new run in a read-only folder": _read_only(folder, whole, "train", "micro", *FLAGS, "--run"),
    "resume in a read-only folder": _read_only(folder, whole, "resume"),
    "new run in the folder of another": _outcome(
      folder, whole, whole, "train", "micro", *FLAGS, "--run", "whole"
    ),
    **_two_writers(folder, whole),
  }


def _outcome(folder: Path, ours: RunFolder, whole: RunFolder, *command: str) -> Outcome:
  return _judge(ours, whole, *run(folder, *command))


def _judge(ours: RunFolder, whole: RunFolder, status: int, printed: str) -> Outcome:
  lines = [
    line for line in printed.splitlines() if "not" in line or "lack" in line or "process" in line
  ]
  kept = [
    step
    for step in finished_steps(ours.checkpoints)
    if not verify(checkpoint_path(ours.checkpoints, step))
  ]
  return Outcome(status, "\n".join(lines), kept, STEPS in kept and same_end(ours, whole))


def _full_disk(folder: Path, whole: RunFolder, *, freed: bool) -> Outcome:
  """Fills a disk up at step 12; where it is `freed`, it has room again after two failed saves."""
  with small_disk(folder / "disk", 8) as disk:
    ours = RunFolder(disk / "run")
    process = start(folder, "train", "micro", *FLAGS, "--run", str(ours.path), setup=SLOWER)
    wait_until(lambda: last_step(ours) >= 12 and 10 in finished_steps(ours.checkpoints), process)
    filler = fill(disk)
    if freed:
      printed = folder / "printed.txt"
      wait_until(lambda: printed.read_text().count("could not be saved") >= 2, process)
      filler.unlink()
    return _judge(ours, whole, *finish(folder, process))


def _read_only(folder: Path, whole: RunFolder, *command: str) -> Outcome:
  with small_disk(folder / "disk", 8) as disk:
    ours = RunFolder(disk / "run")
    if command[0] == "resume":
      shutil.copytree(whole.path, ours.path)
      shutil.rmtree(checkpoint_path(ours.checkpoints, STEPS))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return _outcome(folder, ours, whole, *command, str(ours.path))


def _two_writers(folder: Path, whole: RunFolder) -> dict[str, Outcome]:
  """Resumes a run that another process trains, which then goes on to its end."""
  ours = RunFolder(folder / "shared")
  first = start(folder, "train", "micro", *FLAGS, "--run", "shared", setup=SLOWER)
  wait_until(lambda: last_step(ours) >= 6, first)
  (folder / "printed.txt").rename(folder / "first.txt")
  second = _outcome(folder, ours, whole, "resume", "shared")
  assert f"process {first.pid} on " in second.said, second
  status, _ = finish(folder, first)
  return {
    "resume of a run that another process writes": second,
    "that other process": _judge(ours, whole, status, (folder / "first.txt").read_text()),
  }
