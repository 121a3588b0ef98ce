"""Whatever only displays fails: streams, terminals, pictures, the log, trackers and helpers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import ROOT, SMALL, finish, start, wait_until, write_corpus
from benchmarks.table import table
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.checkpoint.manifest import verify
from jaxlm.run.run_folder import RunFolder

STEPS = 20
TRAIN = ["train", "micro", *SMALL, "--steps", str(STEPS), "--save_every", "10"]
FAILING_PICTURE = """
import jaxlm.run.loop as loop
def draw_loss(*arguments):
  raise RuntimeError("no fonts")
loop.draw_loss = draw_loss
"""
UNWRITABLE_LOG = """
import logging
def refuse(self):
  raise PermissionError(13, "Permission denied")
logging.FileHandler._open = refuse
"""
FAILING_TRACKER = """
import jaxlm.run.trackers as trackers
class Failing:
  def __init__(self, config, start):
    self.fail("at its start")
  def log(self, values, step):
    if step == 5:
      self.fail("at step 5")
  def close(self):
    self.fail("at its end")
  def fail(self, when):
    if when == WHEN:
      raise ConnectionResetError("the helper has died " + when)
trackers.TensorBoard = Failing
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Says how a run ended whose display failed."""

  status: int
  recorded: int
  """steps in metrics.jsonl"""
  saved: int
  """step of the newest checkpoint, if that verifies; else -1"""
  reported: bool
  """the log or stderr names what failed"""


def _judge(folder: Path, name: str, status: int, printed: str, words: str) -> Outcome:
  ours = RunFolder(folder / name)
  saved = max(finished_steps(ours.checkpoints), default=-1)
  if saved >= 0 and verify(checkpoint_path(ours.checkpoints, saved)):
    saved = -1
  log = ours.log.read_text() if ours.log.exists() else ""
  return Outcome(status, last_step(ours), saved, words in log + printed)


def redirected(folder: Path, name: str, redirect: str) -> Outcome:
  """Trains with the streams of a shell's redirection."""
  script = f"'{sys.executable}' -m jaxlm {' '.join(TRAIN)} --run {name} {redirect}"
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
  }
  shell = ["bash", "-c", f"set -o pipefail; {script}"]
  finished = subprocess.run(shell, cwd=folder, env=os.environ | variables, capture_output=True)
  # a stream that was closed before the start is the null device, which refuses nothing
  words = "" if ">&-" in redirect else "takes no more lines"
  return _judge(folder, name, finished.returncode, "", words)


def without_terminal(folder: Path, name: str) -> Outcome:
  """Trains under nohup in a terminal that is closed after the first steps."""
  ours, (terminal, inside) = RunFolder(folder / name), pty.openpty()
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "TERM": "xterm",
  }
  setup = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
  script = setup + "from jaxlm.cli import main; sys.exit(main())"
  process = subprocess.Popen(
    [sys.executable, "-c", script, *TRAIN, "--run", name],
    cwd=folder,
    env=os.environ | variables,
    stdin=inside,
    stdout=inside,
    stderr=inside,
    start_new_session=True,
  )
  os.close(inside)
  wait_until(lambda: last_step(ours) >= 3, process)
  os.close(terminal)
  return _judge(folder, name, process.wait(600), "", "takes no more lines")


def altered(folder: Path, name: str, setup: str, words: str, *flags: str) -> Outcome:
  """Trains after these Python lines."""
  process = start(folder, *TRAIN, "--run", name, *flags, setup=setup)
  return _judge(folder, name, *finish(folder, process), words)


def without_helper(folder: Path, name: str, number: signal.Signals) -> Outcome:
  """Sends a signal to the process that wandb starts to keep its files.

  Raises RuntimeError where the run ends before it has such a process.
  """
  ours = RunFolder(folder / name)
  slower = "import time, jaxlm.run.guard as guard\ncheck = guard.Guard.check_step\n"
  slower += "def slow(*a):\n  time.sleep(0.1)\n  return check(*a)\nguard.Guard.check_step = slow"
  flags = ["--run", name, "--trackers", "wandb"]
  # a service that this process may have would be shared instead of one being started
  settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_SERVICE": ""}
  process = start(folder, *TRAIN, *flags, setup=slower, **settings)

  def helpers() -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid), "wandb"], capture_output=True)
    return [int(helper) for helper in found.stdout.split()]

  wait_until(lambda: last_step(ours) >= 3 and bool(helpers()), process)
  signalled = helpers()
  if not signalled:
    raise RuntimeError(f"wandb started no process; status {process.wait(600)}")
  for helper in signalled:
    os.kill(helper, number)
  try:
    return _judge(folder, name, *finish(folder, process), "trackers=wandb: lost after step")
  finally:
    for helper in signalled:
      with contextlib.suppress(ProcessLookupError):
        os.kill(helper, signal.SIGKILL)


def cases(folder: Path) -> dict[str, Callable[[str], Outcome]]:
  """Returns what is tried, by its name; each is called with the name of a run."""
  streams = {
    "stdout closed after a line, as by `head -1`": "2>/dev/null | head -1",
    "stdout and stderr full": ">/dev/full 2>/dev/full",
    "stdin, stdout and stderr closed from the start": "<&- >&- 2>&-",
  }
  tried: dict[str, Callable[[str], Outcome]] = {
    name: lambda run, redirect=redirect: redirected(folder, run, redirect)
    for name, redirect in streams.items()
  }
  tried["a terminal that goes away, under nohup"] = lambda run: without_terminal(folder, run)
  drawn = "loss.png is not drawn: RuntimeError: no fonts"
  tried["the picture"] = lambda run: altered(folder, run, FAILING_PICTURE, drawn)
  lost = "lines of the log are lost: Permission denied"
  tried["log.txt cannot be written"] = lambda run: altered(folder, run, UNWRITABLE_LOG, lost)
  if importlib.util.find_spec("tensorboardX"):
    for when in ("at its start", "at step 5", "at its end"):
      setup = f"WHEN = {when!r}\n{FAILING_TRACKER}"
      tried[f"a tracker raises {when}"] = lambda run, setup=setup: altered(
        folder, run, setup, "trackers=tensorboard: lost after step", "--trackers", "tensorboard"
      )
  if importlib.util.find_spec("wandb"):
    for word, number in (("killed", signal.SIGKILL), ("hangs", signal.SIGSTOP)):
      tried[f"the helper of wandb is {word}".replace("is hangs", "hangs")] = (
        lambda run, number=number: without_helper(folder, run, number)
      )
  return tried


def section(folder: Path, times: int = 2) -> str:
  """Lets whatever only displays fail; returns the section on it."""
  write_corpus(folder / "text")
  rows = []
  for index, (name, attempt) in enumerate(cases(folder).items()):
    outcomes = [attempt(f"run{index}.{i}") for i in range(times)]
    statuses = " and ".join(sorted({str(outcome.status) for outcome in outcomes}))
    lost = sum(2 * STEPS - outcome.recorded - outcome.saved for outcome in outcomes)
    rows.append([name, times, statuses, lost, sum(outcome.reported for outcome in outcomes)])
  columns = ("what fails", "times", "exit status", "steps not recorded or not saved", "reported")
  return f"""\
Runs of {STEPS} steps that save every 10. A stream that is closed before the start is the null
device, which refuses nothing.

{table(columns, rows)}
"""
