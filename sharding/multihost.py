"""Several processes, one run: joining them, and deciding things once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def join_processes() -> None:
  """Joins the run that the environment describes, before jax is first used; without one, does nothing.

  JAX_COORDINATOR_ADDRESS is host:port of the first process (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), or `auto`
  where JAX finds the cluster by itself: TPU pods, Slurm, Open MPI, Kubernetes.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address == "auto":
    jax.distributed.initialize()
  elif address:
    count, index = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(address, num_processes=count, process_id=index)


def _number(name: str) -> int:
  value = os.environ.get(name, "")
  if not value.isdigit():
    raise ValueError(
      f"{name}={value!r}: must be a whole number where JAX_COORDINATOR_ADDRESS is set"
    )
  return int(value)


def is_main() -> bool:
  """Whether this is the process that writes to disk and speaks."""
  return jax.process_index() == 0


def run_on_main_process(compute: Callable[[], int]) -> int:
  """Runs `compute` in the main process and returns its result in all; if it raises there, all others RuntimeError."""
  if jax.process_count() == 1:
    return compute()
  value, failure = 0, None
  if is_main():
    try:
      value = compute()
    except Exception as error:
      failure = error
  value, failed = (
    int(x) for x in multihost_utils.broadcast_one_to_all(np.array([value, failure is not None]))
  )
  if failure is not None:
    raise failure
  if failed:
    raise RuntimeError("the main process stopped the run; its own message says why")
  return value


def stop_together(step: int, wanted: bool) -> bool:
  """Whether the run stops before `step`: true in all processes at the same one, soon after any of them wanted it.

  All ask before each step. The request travels as jax's notice of preemption does, which costs the steps nothing: the
  runtime of a process that gets SIGTERM (here sent to itself) tells the others, and they settle on a step.
  """
  if jax.process_count() == 1:
    return wanted
  if wanted:
    signal.raise_signal(signal.SIGTERM)
  return multihost_utils.reached_preemption_sync_point(step)
