"""Processes join to one run, or say why they cannot."""

import jax
import pytest
from jax._src import distributed

from pallas_kernels.common.errors import UserError
from sharding import multihost
from sharding.launch import Launch
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


def test_a_launcher_gives_number_and_index_and_all_devices(initialized, monkeypatch):
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
  monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
  monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
  with joined_processes():
    pass
  options = {"local_device_ids": [], "initialization_timeout": 120}
  assert initialized == [((None, 2, 0), options)]


def test_the_main_process_says_who_joined(monkeypatch, capsys):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(distributed.global_state, "coordinator_address", "n1:61444")
  multihost._join(Launch(by="Slurm", processes=2, index=0))
  assert capsys.readouterr().out == (
    "joined 2 processes with 8 devices, started by Slurm; the coordinator is n1:61444\n"
  )


def test_a_tpu_vm_that_has_no_pod_is_alone(monkeypatch, capsys):
  def initialize(*arguments, **options):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  multihost._join(Launch(by="the TPU pod", certain=False))
  assert capsys.readouterr().out == ""


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
