"""A run whose disk is full, read-only or taken: what it says, what it keeps, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jaxlm.train.checkpoint_folder import checkpoint_path, finished_steps
from jaxlm.train.manifest import verify
from jaxlm.train.run_folder import RunFolder
from tests.reliability.processes import SMALL, finish, last_step, records, run, start, wait_until

STEPS = 60
FLAGS = [*SMALL, "--steps", str(STEPS), "--save_every", "5", "--eval_every", "30"]
# so that there is time to take its disk away: each step waits a little
SLOWER = """
import time
import jaxlm.train.metrics as metrics
step = metrics.Reporter.step
metrics.Reporter.step = lambda self, *args, **kwargs: (time.sleep(0.05), step(self, *args, **kwargs))[1]
"""


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
  """A file system of its own; needs the rights to mount one."""
  folder.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True, capture_output=True)
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
  """A file that leaves no byte free."""
  filler = disk / "filler"
  with open(filler, "ab", buffering=0) as file:
    for size in (1 << 20, 1 << 12, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))
  return filler


@dataclasses.dataclass(frozen=True)
class Starved:
  """How a run ended that had no room from some step on, for a while or to its end."""

  status: int
  printed: str
  same_curve: bool
  """its metrics.jsonl is that of a run with room"""
  finished: list[int]
  unsound: int


def full_disk(folder: Path, whole: RunFolder, name: str, *, freed: bool) -> Starved:
  """The disk fills up at step 12 and, where it is `freed`, is empty again from step 32 on."""
  with small_disk(folder / f"disk-{name}", 8) as disk:
    path = disk / "run"
    ours = RunFolder(path)
    process = start(folder, "train", "micro", *FLAGS, "--run", str(path), setup=SLOWER)
    wait_until(lambda: last_step(ours) >= 12, process)
    filler = fill(disk)
    if freed:
      printed = folder / "printed.txt"
      wait_until(lambda: printed.read_text().count("could not be saved") >= 2, process)
      filler.unlink()
    status, said = finish(folder, process)
    steps = finished_steps(ours.checkpoints)
    unsound = sum(bool(verify(checkpoint_path(ours.checkpoints, step))) for step in steps)
    return Starved(status, said, records(ours) == records(whole), steps, unsound)


def campaign(folder: Path) -> dict[str, tuple]:
  return {}
