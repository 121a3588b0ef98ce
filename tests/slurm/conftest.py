"""A Slurm of two nodes on this machine, for the tests that `make test-slurm` runs."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.processes import ROOT, write_corpus

SCRIPT = Path(__file__).parent / "one_machine.sh"
JOB = ROOT / "docs/clusters/slurm.sh"


class Cluster:
  """A Slurm whose files, and those of the runs, are in one folder."""

  quiet = "--signal=CONT@10"
  """replaces the job file's own request for a signal by one that does nothing"""

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = os.environ | {
      "SLURM_CONF": str(folder / "slurm/slurm.conf"),
      "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
      "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
    }

  def call(self, *command: str) -> str:
    """Runs a command of Slurm in the folder and returns what it printed."""
    done = subprocess.run(
      command, cwd=self.folder, env=self.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout

  def submit(self, run: str, *flags: str, options: tuple[str, ...] = (quiet,)) -> str:
    """Submits the job file for a run over both nodes; returns the number of the job."""
    flags = ("micro", *flags, "--mesh.data", "2")
    return self.call("sbatch", "--parsable", *options, str(JOB), run, *flags).strip()

  def start_node(self, node: str) -> None:
    """Starts the daemon of a node again."""
    subprocess.run([SCRIPT, node, self.folder / "slurm"], check=True)

  def state(self, job: str) -> str:
    return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[1]

  def printed(self, job: str) -> str:
    log = self.folder / f"jaxlm-{job}.log"
    return log.read_text() if log.exists() else ""

  def wait(self, job: str, done, seconds: float = 240) -> None:
    """Waits until `done()`; fails with what the job printed."""
    end = time.monotonic() + seconds
    while not done():
      assert time.monotonic() < end, (self.state(job), self.printed(job))
      time.sleep(0.5)

  def wait_for(self, job: str, *states: str) -> None:
    self.wait(job, lambda: self.state(job) in states)

  def run_again(self, job: str) -> None:
    """Ends the two minutes for which Slurm holds a job back that it has queued again."""
    self.wait_for(job, "PENDING")
    self.wait(job, lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
    self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    self.wait(job, lambda: "resuming at step" in self.printed(job))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
  if os.geteuid() != 0:
    pytest.skip("Slurm cannot be started here: it takes root")
  folder = tmp_path_factory.mktemp("slurm")
  write_corpus(folder / "text")
  up = subprocess.run([SCRIPT, "up", folder / "slurm"], capture_output=True, text=True)
  if up.returncode != 0:
    pytest.skip(f"Slurm cannot be installed or started here: {(up.stdout + up.stderr)[-500:]}")
  yield Cluster(folder)
  subprocess.run([SCRIPT, "down", folder / "slurm"], check=True)
