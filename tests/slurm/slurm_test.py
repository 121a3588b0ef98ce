"""The committed job file on a real Slurm: two nodes on this machine, from Debian's packages.

`make test-slurm` runs these. They are skipped where Slurm cannot be installed or started.
"""

import os
import re
import signal
from pathlib import Path

import pytest

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import SMALL
from jaxlm.checkpoint.folder import finished_steps
from jaxlm.run.run_folder import RunFolder

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ENDLESS = [*SMALL, "--steps", "1000000", "--save_every", "20", "--eval_every", "0"]


def saved_by_request(slurm, job: str, run: str) -> None:
  """Checks that the run ended by a checkpoint of its last step."""
  folder = RunFolder(slurm.folder / run)
  step = last_step(folder)
  assert f"stopped and saved at step {step} of 1000000" in slurm.printed(job), slurm.printed(job)
  assert finished_steps(folder.checkpoints)[-1] == step > 0


def start(slurm, run: str, **options) -> str:
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
  job = start(slurm, "limited", options=("--time=1", slurm.quiet))
  slurm.wait_for(job, "TIMEOUT")
  slurm.wait(job, lambda: "go on with: jaxlm resume limited" in slurm.printed(job), 35)
  saved_by_request(slurm, job, "limited")


def test_a_node_that_goes_away_costs_the_steps_since_the_last_checkpoint(slurm):
  job = start(slurm, "lost")
  for process in processes_of_node(slurm, "n2"):
    os.kill(process, signal.SIGKILL)
  slurm.wait_for(job, "PENDING")
  saved = finished_steps(RunFolder(slurm.folder / "lost").checkpoints)[-1]
  slurm.start_node("n2")
  slurm.run_again(job)
  assert f"resuming at step {saved}" in slurm.printed(job)
  slurm.call("scancel", job)
  slurm.wait_for(job, "CANCELLED")


def processes_of_node(slurm, node: str) -> list[int]:
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
