"""Runs that are asked to stop: by signals, by the clock, in one process and in two."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import SMALL, cluster, finish, start, wait_until, write_corpus
from jaxlm.checkpoint.folder import finished_steps
from jaxlm.run.run_folder import RunFolder

ENDLESS = ["train", "micro", *SMALL, "--steps", "100000", "--save_every", "0", "--eval_every", "0"]
SLOW_WRITER = """
import time
import jaxlm.checkpoint.checkpoint as checkpoint
checkpoint.write_manifest = lambda folder: time.sleep(100)
"""


@dataclasses.dataclass(frozen=True)
class Stop:
  """Says how a run left after it was asked to."""

  statuses: tuple[int, ...]
  """of its processes"""
  printed: str
  last: int
  """step of its last record"""
  saved: int
  """step of its newest checkpoint; -1: none"""
  seconds: float
  """from the request, where it was a signal, to the end of the first process"""


def campaign(folder: Path) -> dict[str, Stop]:
  write_corpus(folder / "text")
  return {
    "SIGINT": by_signals(folder, "SIGINT"),
    "SIGTERM, three times": by_signals(folder, "SIGTERM", "SIGTERM", "SIGTERM"),
    "--stop_after 10s": by_clock(folder),
    "SIGINT twice, while a slow disk writes the checkpoint": twice(folder),
    "SIGTERM to the second of two processes": second_of_two(folder, "SIGTERM"),
    "SIGINT to the second of two processes": second_of_two(folder, "SIGINT"),
    "--stop_after 20s in the second of two processes": second_of_two(folder, "--stop_after"),
  }


def by_signals(folder: Path, *signals: str) -> Stop:
  ours = RunFolder(folder / signals[0])
  process = start(folder, *ENDLESS, "--run", signals[0])
  wait_until(lambda: last_step(ours) >= 3, process)
  for name in signals:
    process.send_signal(signal.Signals[name])
    time.sleep(0.01)  # signals that come together count as one
  return _leave(ours, (folder, process))


def by_clock(folder: Path, limit: str = "10s") -> Stop:
  return _leave(
    RunFolder(folder / "clock"),
    (folder, start(folder, *ENDLESS, "--run", "clock", "--stop_after", limit)),
  )


def twice(folder: Path) -> Stop:
  ours = RunFolder(folder / "twice")
  process = start(folder, *ENDLESS, "--run", "twice", setup=SLOW_WRITER)
  wait_until(lambda: last_step(ours) >= 3, process)
  process.send_signal(signal.SIGINT)
  wait_until(lambda: any(ours.checkpoints.glob("*")), process)
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  return _leave(ours, (folder, process))


def second_of_two(folder: Path, how: str, limit: str = "20s") -> Stop:
  """Asks the second of two processes; the first, which writes the checkpoint, has to hear of it."""
  ours, other = RunFolder(folder / f"two {how}"), folder / f"second {how}"
  other.mkdir()
  flags = ["--mesh.data", "2", "--data.source", str(folder / "text"), "--run", str(ours.path)]
  processes = []
  for where, shared in zip((folder, other), cluster(2)):
    own = limit if where == other and how == "--stop_after" else ""
    processes.append((where, start(where, *ENDLESS, *flags, "--stop_after", own, **shared)))
  wait_until(lambda: last_step(ours) >= 3, processes[0][1])
  if how != "--stop_after":
    processes[1][1].send_signal(signal.Signals[how])
  return _leave(ours, *processes)


def resumed(folder: Path, name: str, *flags: str) -> Stop:
  return _leave(RunFolder(folder / name), (folder, start(folder, "resume", name, *flags)))


def _leave(ours: RunFolder, *processes: tuple[Path, subprocess.Popen]) -> Stop:
  began = time.monotonic()
  (first, printed), *others = (finish(*process) for process in processes)
  seconds = time.monotonic() - began
  saved = max(finished_steps(ours.checkpoints), default=-1)
  return Stop((first, *(status for status, _ in others)), printed, last_step(ours), saved, seconds)
