"""Every signal that announces an end from outside, and two that announce none."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import finish, start, wait_until, write_corpus
from benchmarks.reliability.stops import ENDLESS
from benchmarks.table import table
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.checkpoint.manifest import verify
from jaxlm.run.interrupt import KEYS, NOTICES
from jaxlm.run.run_folder import RunFolder

NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
NO_NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # else it is inherited


@dataclasses.dataclass(frozen=True)
class Notice:
  """Says how a run took a signal."""

  status: int
  lost: int
  """recorded steps that are not in a checkpoint that verifies"""
  printed: str

  @property
  def is_resumable(self) -> bool:
    """Returns whether it said so, with the command."""
    return "resumable; go on with: jaxlm resume" in self.printed


def told(folder: Path, name: str, *signals: str, setup: str = NO_NOHUP) -> Notice:
  """Sends an endless run these signals after its third step, the next ones when it goes on."""
  ours = RunFolder(folder / name)
  process = start(folder, *ENDLESS, "--run", name, setup=setup, printed=f"{name}.txt")
  reached = 0
  for one in signals:
    wait_until(lambda reached=reached: last_step(ours) >= reached + 3, process)
    reached = last_step(ours)
    process.send_signal(signal.Signals[one])
    if one == "SIGTSTP":  # it stands still until SIGCONT
      time.sleep(0.5)
      reached = last_step(ours) - 3
  status, printed = finish(folder, process, f"{name}.txt")
  sound = [
    step
    for step in finished_steps(ours.checkpoints)
    if not verify(checkpoint_path(ours.checkpoints, step))
  ]
  return Notice(status, last_step(ours) - max(sound, default=0), printed)


def section(folder: Path, times: int = 2) -> str:
  """Sends every signal that says the end is near; returns the section on it."""
  write_corpus(folder / "text")
  tried = {name: ((name,), NO_NOHUP) for name in (*KEYS, *NOTICES) if hasattr(signal, name)}
  tried |= {
    "SIGHUP under nohup, then SIGTERM": (("SIGHUP", "SIGTERM"), NOHUP),
    "SIGTSTP (Ctrl-Z), SIGCONT, then SIGTERM": (("SIGTSTP", "SIGCONT", "SIGTERM"), NO_NOHUP),
  }
  rows = []
  for index, (name, (signals, setup)) in enumerate(tried.items()):
    notices = [told(folder, f"run{index}.{i}", *signals, setup=setup) for i in range(times)]
    statuses = " and ".join(sorted({str(notice.status) for notice in notices}))
    resumable = sum(notice.is_resumable for notice in notices)
    rows.append([name, times, statuses, resumable, sum(notice.lost for notice in notices)])
  columns = ("sent", "times", "exit status", "said to be resumable", "steps lost")
  return f"""\
Endless runs that save only when they stop; signals come after the third step, later ones after
three more. Lost are recorded steps that no checkpoint holds which verifies.

{table(columns, rows)}
"""
