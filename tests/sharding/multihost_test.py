"""Processes join to one run, or say why they cannot."""

import jax
import pytest
from jax._src import distributed

from pallas_kernels.common.errors import UserError
from sharding.multihost import joined_processes


@pytest.fixture
def initialized(monkeypatch):
  """Clears what could have started this test among others; keeps what jax is told."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "JAXLM_JOIN"):
    monkeypatch.delenv(name, raising=False)
  return calls


def test_a_process_alone_joins_nobody(initialized, capsys):
  with joined_processes():
    pass
  assert initialized == [] and capsys.readouterr().out == ""


def test_a_launcher_gives_number_and_index_and_all_devices(initialized, monkeypatch, capsys):
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
  monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
  monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
  with joined_processes():
    pass
  assert initialized == [((None, 2, 0), {"local_device_ids": []})]
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("joined ") and "started by Open MPI; the coordinator is" in line


def test_processes_that_jax_cannot_join_are_refused(initialized, monkeypatch):
  """jax knows no MPICH: each process would take itself for the whole run."""
  monkeypatch.setenv("PMI_SIZE", "2")
  monkeypatch.setenv("PMI_RANK", "0")

  def initialize(*arguments, **options):
    distributed.State().initialize(*arguments, **options)

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(UserError, match="MPI started this process.*coordinator.*JAXLM_JOIN=0"):
    with joined_processes():
      pass
