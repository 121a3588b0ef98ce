"""Joins several processes to one run, and does on the main process what happens once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src import distributed  # the only place where jax keeps the coordinator's address
from jax.experimental import multihost_utils

from pallas_kernels.common.errors import UserError
from sharding.failure import ExplainedAborts, end_together
from sharding.launch import HOW_ALONE, PATIENCE, Launch, read_launch, read_patience


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
  """Joins the processes that were started together to one run, and ends them together.

  Has to be entered before jax is first used. srun, Open MPI, TPU pods and Kubernetes Jobs are known
  to jax; elsewhere JAX_COORDINATOR_ADDRESS is host:port of process 0, and JAX_NUM_PROCESSES and
  JAX_PROCESS_ID count the processes. The main process prints who joined. JAXLM_JOIN=0 switches it
  off. A process that waits for another one longer than JAXLM_JOIN_SECONDS (120) ends with a message
  and status 1. Raises UserError where processes were started together but cannot join, because each
  would take itself for the whole run.
  """
  # jax sets the variable where it has seen that there are no TPUs
  on_tpu_vm = "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu")
  launch = read_launch(os.environ, on_tpu_vm=bool(on_tpu_vm))
  if launch is not None:
    _join(launch)
  # one process leaves jax's devices alone: what a run tells malloc has to come before them
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    yield
    return
  with end_together():
    yield


def _join(launch: Launch) -> None:
  """Joins this process to the others; prints who they are in the main one."""
  # jax itself says nothing while it waits, and then aborts the process without an exception
  seconds = read_patience(os.environ)
  others = f"the other processes that {launch.by} has started"
  message = f"waiting for {others}, for {PATIENCE}={seconds} s at most"
  reminder = threading.Timer(min(20, seconds / 2), print, (message,), {"flush": True})
  reminder.start()
  aborts = ExplainedAborts(lambda: f"{others} did not all join within {PATIENCE}={seconds} s")
  try:
    jax.distributed.initialize(
      launch.address,
      launch.processes,
      launch.index,
      local_device_ids=[] if launch.all_devices else None,  # [] restricts nothing
      initialization_timeout=seconds,
    )
  except (ValueError, OSError) as error:  # OSError: of a TPU VM's metadata
    if not launch.certain:
      return
    rule = f"give JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; {HOW_ALONE}"
    message = f"{launch.by} started this process among others, but jax cannot join them ({error})"
    raise UserError(f"{message}: {rule}") from error
  finally:
    aborts.remove()
    reminder.cancel()
  if is_main() and (count := jax.process_count()) > 1:
    joined = f"joined {count} processes with {jax.device_count()} devices, started by {launch.by}"
    print(
      f"{joined}; the coordinator is {distributed.global_state.coordinator_address}", flush=True
    )


def is_main() -> bool:
  """Returns whether this is the process that writes to disk and prints."""
  return jax.process_index() == 0


def run_on_main_process(compute: Callable[[], int | None]) -> int:
  """Runs `compute` in the main process and returns its result (None: 0) in all processes.

  All processes have to call it. Where `compute` raises, the main process raises that, and the
  others stop too: by UserError if it was one, else by RuntimeError, instead of waiting for ever.
  """
  if jax.process_count() == 1:
    return compute() or 0
  value: int | None = 0
  failure: Exception | None = None
  if is_main():
    try:
      value = compute()
    except Exception as error:
      failure = error
  outcome = [value or 0, failure is not None, isinstance(failure, UserError)]
  value, failed, by_user = multihost_utils.broadcast_one_to_all(
    np.array(outcome, np.int32)
  ).tolist()
  if failure is not None:
    raise failure
  if failed:
    kind = UserError if by_user else RuntimeError
    raise kind("the main process stopped the run; its own message says why")
  return value


def stop_together(step: int, wanted: bool) -> bool:
  """Returns whether the run stops before `step`, soon after any process `wanted` it.

  All ask before each step, and all stop at the same one. The request travels as jax's notice of
  preemption does, which costs the steps nothing: the runtime of a process that gets SIGTERM (here
  sent to itself) tells the others, and they settle on a step.
  """
  if jax.process_count() == 1:
    return wanted
  if wanted:
    signal.raise_signal(signal.SIGTERM)
  return multihost_utils.reached_preemption_sync_point(step)
