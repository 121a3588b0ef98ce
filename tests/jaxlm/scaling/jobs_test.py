"""Sweeps whose runs are jobs of an executor: rows, losses of single jobs, and restarts."""

import os
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.scaling.sweep import read_table, sweep
from jaxlm.train import IndexedBatches, Start, Task, Weighted

CONFIG = TrainConfig(
  steps=3,
  batch=1,
  mesh=MeshConfig(data=1),
  optimizer=OptimizerConfig(warmup=1, weight_decay=0.0),
)
GRID = {"optimizer.learning_rate": [0.1, 0.2]}
DEADLY = 0.2


class Square(Task):
  """Minimises the distance of w from `goal`."""

  def __init__(self, goal):
    self.goal = goal

  def init(self, key):
    return Start({"w": jnp.ones(1)})

  def batches(self, rows):
    return IndexedBatches(lambda index: np.ones(1, np.float32))

  def objective(self, params, model_state, batch, key):
    return {"loss": Weighted(((params["w"] - self.goal) ** 2).sum(), batch.sum())}


def make_square(config, goal=0.0):
  return config, Square(goal)


class Inline:
  """Runs each job when it is submitted; `lost` are the learning rates whose jobs raise."""

  def __init__(self, *lost):
    self.lost, self.submitted = lost, []

  def submit(self, fn, *arguments):
    rate = arguments[0].values["optimizer.learning_rate"]
    self.submitted.append(rate)
    error = RuntimeError("node n1\nfell over") if rate in self.lost else None
    value = None if error else fn(*arguments)
    return Ended(value, error)


class Ended:
  """Is a job that has ended."""

  def __init__(self, value, error):
    self.value, self.error = value, error

  def done(self):
    return True

  def result(self):
    if self.error:
      raise self.error
    return self.value


def test_a_lost_job_costs_its_own_row_and_is_run_by_the_next_call(tmp_path, caplog):
  table = tmp_path / "table.csv"
  rows = sweep(CONFIG, GRID, table, make_task=make_square, executor=Inline(DEADLY))
  assert [row["optimizer.learning_rate"] for row in rows] == [0.1]
  assert "lost {'optimizer.learning_rate': 0.2}: RuntimeError: fell over" in caplog.text
  again = Inline()
  rows = sweep(CONFIG, GRID, table, make_task=make_square, executor=again)
  assert again.submitted == [DEADLY] and len(rows) == len(read_table(table)) == 2
  table.unlink()  # as if this process had ended before its jobs
  recovered = sweep(CONFIG, GRID, table, make_task=make_square, executor=again)
  assert recovered == rows and again.submitted == [DEADLY]
  here = sweep(CONFIG, GRID, tmp_path / "here.csv", make_task=make_square)
  assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in here], abs=1e-6)


def test_values_of_the_task_are_given_to_it_and_distinguish_rows(tmp_path):
  points = [{"task.goal": 0.0, "seed": 0}, {"task.goal": 3.0, "seed": 0}]
  rows = sweep(CONFIG, points, tmp_path / "t.csv", make_task=make_square)
  assert rows[1]["loss"] > rows[0]["loss"] and [row["task.goal"] for row in rows] == [0, 3]
  assert len({row["config"] for row in rows}) == 2


def make_or_die(config):
  if config.optimizer.learning_rate == DEADLY:
    os.kill(os.getpid(), signal.SIGKILL)
  return make_square(config)


@pytest.mark.slow
def test_jobs_of_submitit_on_this_machine(tmp_path, caplog):
  submitit = pytest.importorskip("submitit", reason="submitit is not installed: extra slurm")
  import cloudpickle

  cloudpickle.register_pickle_by_value(sys.modules[__name__])
  executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
  executor.update_parameters(timeout_min=5)
  table = tmp_path / "table.csv"
  rows = sweep(CONFIG, GRID, table, make_task=make_or_die, executor=executor)
  assert [row["optimizer.learning_rate"] for row in rows] == [0.1]
  assert "lost {'optimizer.learning_rate': 0.2}" in caplog.text
  rows = sweep(CONFIG, GRID, table, make_task=make_square, executor=executor)
  assert len(rows) == 2 and len(list((tmp_path / "table_rows").glob("*.json"))) == 2
  here = sweep(CONFIG, GRID, tmp_path / "here.csv", make_task=make_square)
  assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in here], abs=1e-6)
