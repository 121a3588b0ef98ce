"""The committed job file on a real Slurm: two nodes on this machine, from Debian's packages.

`make test-slurm` runs these. They are skipped where Slurm cannot be installed or started.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import ROOT, SMALL, write_corpus
from jaxlm.checkpoint.folder import finished_steps
from jaxlm.run.run_folder import RunFolder

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "one_machine.sh"
JOB = ROOT / "docs/clusters/slurm.sh"
ENDLESS = [*SMALL, "--steps", "1000000", "--save_every", "20", "--eval_every", "0"]
QUIET = "--signal=CONT@10"
"""replaces the job file's own request for a signal by one that does nothing"""


class Cluster:
  """A Slurm whose files, and those of the runs, are in one folder."""

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

  def submit(self, run: str, *flags: str, options: tuple[str, ...] = (QUIET,)) -> str:
    """Submits the job file for a run over both nodes; returns the number of the job."""
    flags = ("micro", *flags, "--mesh.data", "2")
    return self.call("sbatch", "--parsable", *options, str(JOB), run, *flags).strip()

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


@pytest.fixture(scope="module")
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


def saved_by_request(slurm: Cluster, job: str, run: str) -> None:
  """Checks that the run ended by a checkpoint of its last step."""
  folder = RunFolder(slurm.folder / run)
  step = last_step(folder)
  assert f"stopped and saved at step {step} of 1000000" in slurm.printed(job), slurm.printed(job)
  assert finished_steps(folder.checkpoints)[-1] == step > 0


def start(slurm: Cluster, run: str, **options) -> str:
  """Submits an endless run and waits for its first checkpoint."""
  job = slurm.submit(run, *ENDLESS, **options)
  checkpoints = RunFolder(slurm.folder / run).checkpoints
  slurm.wait(job, lambda: checkpoints.exists() and finished_steps(checkpoints))
  return job


def test_the_job_file_trains_on_both_nodes(slurm):
  job = slurm.submit("whole", *SMALL, "--steps", "6", "--save_every", "3")
  slurm.wait_for(job, "COMPLETED")
  printed = slurm.printed(job)
  assert "joined 2 processes with 2 devices, started by Slurm; the coordinator is n1:" in printed
  assert "on cpu (data 2), into whole" in printed
  assert finished_steps(RunFolder(slurm.folder / "whole").checkpoints)[-1] == 6


def test_scancel_saves_and_is_the_end(slurm):
  job = start(slurm, "cancelled")
  slurm.call("scancel", job)
  slurm.wait_for(job, "CANCELLED")
  slurm.wait(job, lambda: "go on with: jaxlm resume cancelled" in slurm.printed(job), 35)
  saved_by_request(slurm, job, "cancelled")


def test_a_requeue_saves_and_goes_on(slurm):
  job = start(slurm, "requeued")
  slurm.call("scontrol", "requeue", job)
  slurm.wait_for(job, "PENDING")
  saved_by_request(slurm, job, "requeued")
  step = last_step(RunFolder(slurm.folder / "requeued"))
  slurm.run_again(job)
  assert f"resuming at step {step}" in slurm.printed(job)
  slurm.call("scancel", job)
  slurm.wait_for(job, "CANCELLED")


def test_the_signal_before_the_time_limit_saves_and_queues_the_job_again(slurm):
  job = start(slurm, "signalled", options=("--time=2", "--signal=USR1@30"))
  slurm.wait_for(job, "PENDING")
  saved_by_request(slurm, job, "signalled")
  slurm.call("scancel", job)


def test_the_time_limit_itself_saves(slurm):
  job = start(slurm, "limited", options=("--time=1", QUIET))
  slurm.wait_for(job, "TIMEOUT")
  slurm.wait(job, lambda: "go on with: jaxlm resume limited" in slurm.printed(job), 35)
  saved_by_request(slurm, job, "limited")


def test_a_node_that_goes_away_costs_the_steps_since_the_last_checkpoint(slurm):
  job = start(slurm, "lost")
  for process in processes_of_node(slurm, "n2"):
    os.kill(process, signal.SIGKILL)
  slurm.wait_for(job, "PENDING")
  saved = finished_steps(RunFolder(slurm.folder / "lost").checkpoints)[-1]
  subprocess.run([SCRIPT, "n2", slurm.folder / "slurm"], check=True)
  slurm.run_again(job)
  assert f"resuming at step {saved}" in slurm.printed(job)
  slurm.call("scancel", job)
  slurm.wait_for(job, "CANCELLED")


def processes_of_node(slurm: Cluster, node: str) -> list[int]:
  """Returns the node's daemon, the daemons of its job steps, and what these have started."""
  daemon = int((slurm.folder / f"slurm/{node}.pid").read_text())
  tasks = []
  for environment in Path("/proc").glob("[0-9]*/environ"):
    try:
      if f"SLURMD_NODENAME={node}".encode() in environment.read_bytes().split(b"\0"):
        tasks.append(int(environment.parent.name))
    except OSError:  # it has ended
      continue
  parents = {
    int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{task}/status").read_text())[1]) for task in tasks
  }
  return [daemon, *(parents - {0, 1}), *tasks]
