"""What was started together is recognised by its environment, and what cannot be is refused."""

import pytest

from pallas_kernels.common.errors import UserError
from sharding.launch import Launch, read_launch, read_patience

SLURM = {
  "SLURM_JOB_NUM_NODES": "2",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
BY_HAND = {
  "JAX_COORDINATOR_ADDRESS": "host0:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


def test_an_ordinary_process_is_alone():
  assert read_launch({}) is None
  assert read_launch({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a notebook in a pod
  assert read_launch({"SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}) is None  # of a job script


def test_launchers_say_how_many_and_which_and_jax_finds_the_coordinator():
  assert read_launch(SLURM) == Launch(by="Slurm", processes=2, index=1, all_devices=True)
  assert read_launch(OPEN_MPI) == Launch(by="Open MPI", processes=4, index=3)
  assert read_launch({"PMI_SIZE": "2", "PMI_RANK": "0"}) == Launch(by="MPI", processes=2, index=0)
  # mpirun inside a Slurm job starts a daemon on each host by srun, and these the processes
  assert read_launch(SLURM | OPEN_MPI) == Launch(by="Open MPI", processes=4, index=3)
  assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_variables_of_jax_go_before_a_launcher_and_are_completed_by_it():
  address = BY_HAND["JAX_COORDINATOR_ADDRESS"]
  by = "JAX_COORDINATOR_ADDRESS"
  assert read_launch(BY_HAND) == Launch(by=by, processes=4, index=2, address=address)
  only_address = {"JAX_COORDINATOR_ADDRESS": address}
  want = Launch(by="Open MPI", processes=4, index=3, address=address)
  assert read_launch(OPEN_MPI | only_address) == want


def test_pods_are_left_to_jax():
  assert read_launch({"JOB_COMPLETION_INDEX": "1"}) == Launch(by="Kubernetes")
  assert read_launch({"TPU_WORKER_HOSTNAMES": "a,b"}) == Launch(by="the TPU pod")
  for alone in ("localhost", "WARNING: could not determine hostnames, please set TPU_X"):
    assert read_launch({"TPU_WORKER_HOSTNAMES": alone}) is None
  assert read_launch({}, on_tpu_vm=True) == Launch(by="the TPU pod", certain=False)


def test_joining_can_be_switched_off():
  for environment in (SLURM, OPEN_MPI, BY_HAND, {"JOB_COMPLETION_INDEX": "1"}):
    assert read_launch(environment | {"JAXLM_JOIN": "0"}) is None
  with pytest.raises(UserError, match="JAXLM_JOIN='no': must be 0 or 1"):
    read_launch({"JAXLM_JOIN": "no"})


def test_how_long_to_wait_for_the_others():
  assert read_patience({}) == 120
  assert read_patience({"JAXLM_JOIN_SECONDS": "7"}) == 7
  for value in ("0", "-1", "soon", "1.5"):
    with pytest.raises(UserError, match=f"JAXLM_JOIN_SECONDS='{value}': must be a whole number"):
      read_patience({"JAXLM_JOIN_SECONDS": value})


@pytest.mark.parametrize(
  ("environment", "all_devices"),
  [
    (SLURM, True),  # one process for each host
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, True),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, False),  # one for each GPU
    (SLURM | {"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "3"}, True),  # --gpus-per-task
    (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, False),  # the user knows
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
  ],
)
def test_a_process_takes_all_gpus_that_are_its_own(environment, all_devices):
  """Under Slurm and Open MPI jax else gives a process one GPU, and seven of eight stay idle."""
  assert read_launch(environment).all_devices is all_devices


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "auto"}, "JAX_COORDINATOR_ADDRESS='auto': must be host:port"),
    ({"JAX_COORDINATOR_ADDRESS": "host0"}, "JAX_COORDINATOR_ADDRESS='host0': must be host:port"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': must be a whole number"),
    ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': must be a whole number"),
    ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be below JAX_NUM_PROCESSES=4"),
  ],
)
def test_what_is_wrong_by_hand_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    read_launch(BY_HAND | changes)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_missing_by_hand_is_refused(name):
  """Otherwise each process would take itself for the whole run."""
  environment = {key: value for key, value in BY_HAND.items() if key != name}
  with pytest.raises(UserError, match=name):
    read_launch(environment)


def test_a_slurm_job_of_several_hosts_without_srun_is_refused():
  with pytest.raises(UserError, match="SLURM_JOB_NUM_NODES=2: start it by srun"):
    read_launch({"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"})
