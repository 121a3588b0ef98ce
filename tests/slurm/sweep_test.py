"""A sweep whose runs are jobs of a real Slurm, by submitit: lost jobs cost their own rows."""

import os
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.scaling.sweep import sweep
from jaxlm.train import IndexedBatches, Start, Task, Weighted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
CONFIG = TrainConfig(
  steps=3,
  batch=1,
  mesh=MeshConfig(data=1),
  optimizer=OptimizerConfig(warmup=1, weight_decay=0.0),
)
RATES = [0.1, 0.2, 0.3]
DEADLY, CANCELLED = 0.1, 0.2
SACCT = r"""#!/bin/bash
# This Slurm keeps no accounts: says what the controller knows, as sacct would.
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then
    scontrol -o show job "$2" | sed -nE 's/.*JobId=([0-9]+) .*JobState=([A-Z_]+) .*/\1|\2|/p'
  fi
  shift
done
"""


class Square(Task):
  """Minimises w^2."""

  def init(self, key):
    return Start({"w": jnp.ones(1)})

  def batches(self, rows):
    return IndexedBatches(lambda index: np.ones(1, np.float32))

  def objective(self, params, model_state, batch, key):
    return {"loss": Weighted((params["w"] ** 2).sum(), batch.sum())}


def make_square(config):
  return config, Square()


def make_or_die(config):
  if config.optimizer.learning_rate == DEADLY:
    os.kill(os.getpid(), signal.SIGKILL)
  return make_square(config)


class Cancelling:
  """Cancels the job of one learning rate as soon as it is submitted."""

  def __init__(self, executor):
    self.executor = executor

  def submit(self, fn, *arguments):
    job = self.executor.submit(fn, *arguments)
    if arguments[0].config.optimizer.learning_rate == CANCELLED:
      job.cancel()
    return job


def test_a_job_that_dies_and_one_that_is_cancelled_cost_their_own_rows(slurm, monkeypatch, caplog):
  submitit = pytest.importorskip("submitit", reason="submitit is not installed: extra slurm")
  import cloudpickle

  cloudpickle.register_pickle_by_value(sys.modules[__name__])
  folder = slurm.folder / "sweep"
  (folder / "bin").mkdir(parents=True)
  (folder / "bin/sacct").write_text(SACCT)
  (folder / "bin/sacct").chmod(0o755)
  for name, value in slurm.environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("PATH", f"{folder / 'bin'}:{slurm.environment['PATH']}")
  executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="slurm")
  executor.update_parameters(timeout_min=5, cpus_per_task=1)
  grid, table = {"optimizer.learning_rate": RATES}, folder / "table.csv"
  rows = sweep(CONFIG, grid, table, make_task=make_or_die, executor=Cancelling(executor))
  assert [row["optimizer.learning_rate"] for row in rows] == [0.3]
  for rate in (DEADLY, CANCELLED):
    assert f"lost {{'optimizer.learning_rate': {rate}}}" in caplog.text
  rows = sweep(CONFIG, grid, table, make_task=make_square, executor=executor)
  assert [row["optimizer.learning_rate"] for row in rows] == RATES
  assert len(list((folder / "jobs").glob("*_result.pkl"))) >= 3
