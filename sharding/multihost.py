"""Joins several processes to one run, and does on the main process what happens once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels.common.errors import UserError


def join_processes() -> None:
  """Joins the run that the environment describes, if any; has to come before jax is first used.

  JAX_COORDINATOR_ADDRESS is host:port of the first process (with JAX_NUM_PROCESSES and
  JAX_PROCESS_ID), or `auto` where JAX finds the cluster by itself: TPU pods, Slurm, Open MPI,
  Kubernetes. Raises UserError where one of the numbers is missing or is none.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address == "auto":
    jax.distributed.initialize()
  elif address:
    processes = _read_number("JAX_NUM_PROCESSES")
    index = _read_number("JAX_PROCESS_ID")
    jax.distributed.initialize(address, num_processes=processes, process_id=index)


def _read_number(name: str) -> int:
  value = os.environ.get(name, "")
  if not value.isdigit():
    rule = "must be a whole number where JAX_COORDINATOR_ADDRESS is set"
    raise UserError(f"{name}={value!r}: {rule}")
  return int(value)


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
