"""Trains the `tiny` preset, stops it half-way, resumes it, evaluates it and samples from it.

Everything goes through the command line, as you would type it; each command is shown before it
runs.
"""

import itertools
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxlm.presets import tiny
from jaxlm.run.run_folder import RunFolder, read_records

PROMPT = "class Parser:\n    def __init__(self, name):\n"


def jaxlm(*arguments: str) -> subprocess.Popen:
  """Prints a command and starts it."""
  print(f"\n$ jaxlm {shlex.join(arguments)}", flush=True)
  return subprocess.Popen([sys.executable, "-m", "jaxlm", *arguments])


def finish(process: subprocess.Popen, *allowed: int) -> None:
  """Waits for a command, and leaves with a message where its status is not 0 or an allowed one."""
  if process.wait() not in (0, *allowed):
    sys.exit(f"demo: that command ended with status {process.returncode}")


def interrupt_at(process: subprocess.Popen, folder: RunFolder, step: int) -> None:
  """Sends Ctrl-C once the run has done `step` steps."""
  while process.poll() is None:
    if folder.metrics.exists() and sum(1 for _ in read_records(folder.metrics)) >= step:
      print("\n[the demo presses Ctrl-C]", flush=True)
      process.send_signal(signal.SIGINT)
      return
    time.sleep(0.2)


def main() -> None:
  """Runs the demo in a new folder below runs/."""
  start = time.perf_counter()
  names = itertools.chain(["runs/demo"], (f"runs/demo-{count}" for count in itertools.count(2)))
  folder = RunFolder(next(path for path in map(Path, names) if not path.exists()))
  run = str(folder.path)

  training = jaxlm("train", "tiny", "--run", run)
  interrupt_at(training, folder, tiny().steps // 2)
  finish(training, 130)
  finish(jaxlm("resume", run))
  finish(jaxlm("eval", run))
  finish(jaxlm("sample", run, "--prompt", PROMPT, "--temperature", "0.7"))
  seconds = time.perf_counter() - start
  print(f"\n{folder.plot} shows the curve; the whole demo took {seconds:.0f} seconds")


if __name__ == "__main__":
  main()
