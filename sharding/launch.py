"""Reads from environment variables which processes were started together with this one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from pallas_kernels.common.errors import UserError

PATIENCE = "JAXLM_JOIN_SECONDS"
HOW_ALONE = "JAXLM_JOIN=0 makes each process a run of its own"
# Launcher: the variables that hold the number of processes and the index of this one. mpirun inside
# a Slurm job starts its processes through srun, so Open MPI goes first.
_LAUNCHERS = {
  "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
  "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
  "MPI": ("PMI_SIZE", "PMI_RANK"),
}
_PODS = {
  "TPU_PROCESS_ADDRESSES_PATH": "the TPU pod",
  "TPU_PROCESS_ADDRESSES": "the TPU pod",
  "TPU_WORKER_HOSTNAMES": "the TPU pod",
  "JOB_COMPLETION_INDEX": "Kubernetes",
}
# libtpu itself writes a warning into TPU_WORKER_HOSTNAMES where there is no TPU
_SEVERAL_HOSTS = re.compile(r"[\w.:\[\]-]+(,[\w.:\[\]-]+)+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
  """Describes the processes that were started together; jax asks the cluster for what is None."""

  by: str
  """what started them"""
  processes: int | None = None
  """how many they are"""
  index: int | None = None
  """which of them this is"""
  address: str | None = None
  """host:port of process 0"""
  all_devices: bool = False
  """whether this process has to use every GPU that it sees, not only one of its own"""
  certain: bool = True
  """whether there are others for sure; a TPU VM may also be alone"""


def read_launch(environment: Mapping[str, str], *, on_tpu_vm: bool = False) -> Launch | None:
  """Returns how this process was started among others, or None where it is alone.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID go before what a launcher says. On
  a TPU VM the machine knows its pod, not the environment. Raises UserError for values that cannot
  be, and where a Slurm job has several hosts but srun did not start this process.
  """
  switch = environment.get("JAXLM_JOIN", "1")
  if switch not in ("0", "1"):
    raise UserError(f"JAXLM_JOIN={switch!r}: must be 0 or 1")
  if switch == "0":
    return None
  by, processes, index = _read_launcher(environment)
  if "JAX_COORDINATOR_ADDRESS" in environment:
    processes = _read_number(environment, "JAX_NUM_PROCESSES", processes)
    index = _read_number(environment, "JAX_PROCESS_ID", index)
    address = environment["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r".+:\d+", address):
      rule = "must be host:port of process 0; leave it out where jax knows the cluster"
      raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: {rule}")
    if not index < processes:
      raise UserError(f"JAX_PROCESS_ID={index}: must be below JAX_NUM_PROCESSES={processes}")
    by = by or "JAX_COORDINATOR_ADDRESS"
  else:
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
      if name in environment:
        rule = "needs JAX_COORDINATOR_ADDRESS, which is host:port of process 0"
        raise UserError(f"{name}={environment[name]!r}: {rule}")
    address = None
  if processes == 1:
    return None
  if processes is not None:
    own = _sees_own_devices(by, environment)
    return Launch(by=by, processes=processes, index=index, address=address, all_devices=own)
  if int(environment.get("SLURM_JOB_NUM_NODES", "1")) > 1 and "SLURM_STEP_ID" not in environment:
    hosts = f"SLURM_JOB_NUM_NODES={environment['SLURM_JOB_NUM_NODES']}"
    raise UserError(f"{hosts}: start it by srun, so that every host takes part; {HOW_ALONE}")
  pods = [
    pod
    for name, pod in _PODS.items()
    if name in environment
    and (name != "TPU_WORKER_HOSTNAMES" or _SEVERAL_HOSTS.fullmatch(environment[name]))
  ]
  if pods or on_tpu_vm:
    return Launch(by=pods[0] if pods else "the TPU pod", certain=bool(pods))
  return None


def read_patience(environment: Mapping[str, str]) -> int:
  """Returns for how many seconds a process waits for the others to join, by default 120.

  Raises UserError for a value of JAXLM_JOIN_SECONDS that is no whole number of at least 1.
  """
  value = environment.get(PATIENCE, "120")
  if not (value.isdecimal() and int(value) >= 1):
    raise UserError(f"{PATIENCE}={value!r}: must be a whole number of seconds, at least 1")
  return int(value)


def _read_launcher(environment: Mapping[str, str]) -> tuple[str, int | None, int | None]:
  """Returns (launcher, number of processes, index of this one); ("", None, None) without one."""
  for launcher, (size, rank) in _LAUNCHERS.items():
    if size in environment and rank in environment:
      return launcher, int(environment[size]), int(environment[rank])
  return "", None, None


def _read_number(environment: Mapping[str, str], name: str, otherwise: int | None) -> int:
  value = environment.get(name, "" if otherwise is None else str(otherwise))
  if not value.isdigit():
    rule = "must be a whole number where JAX_COORDINATOR_ADDRESS is set"
    raise UserError(f"{name}={value!r}: {rule}")
  return int(value)


def _sees_own_devices(by: str, environment: Mapping[str, str]) -> bool:
  """Returns whether the GPUs that this process sees are all its own.

  They are where it is alone on its host, and where its launcher shows it a single one. Else, under
  Slurm and Open MPI, jax gives each process the one GPU that has its index on the host.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environment:
    return False
  if "," not in environment.get("CUDA_VISIBLE_DEVICES", ","):
    return True
  if by == "Open MPI":
    return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
  if by == "Slurm":
    return environment["SLURM_STEP_NUM_TASKS"] == environment.get("SLURM_STEP_NUM_NODES")
  return False
