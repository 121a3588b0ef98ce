"""Keeps glibc from returning freed memory after every step (CPU only), and formats memory use."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import resource
import sys
from pathlib import Path

import jax

_ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "kfd")
"""files below /dev of TPUs and GPUs"""
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
  """Tells glibc's malloc to serve large blocks from the heap and never to trim it.

  Otherwise each step's temporaries are returned to the system and faulted in again. Resident memory
  grows by about half. Returns whether it took effect, which needs Linux with glibc. Only large host
  buffers gain, that is, JAX on CPU.
  """
  if not sys.platform.startswith("linux"):
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "gnu_get_libc_version"):
    return False
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
  done = all([libc.mallopt(option, value) for option, value in settings])
  logging.getLogger("jaxlm").info(
    "malloc keeps freed memory (keep_freed_memory)" if done else "mallopt had no effect"
  )
  return done


def keep_freed_memory_on_cpu() -> None:
  """Calls `keep_freed_memory` where jax runs on CPU.

  Has to come before jax is first used: the threads that jax starts then stay with the part of the
  heap that they began with, and return a large step's temporaries whatever malloc is told later.
  """
  if _runs_on_cpu():
    keep_freed_memory()


def _runs_on_cpu() -> bool:
  """Returns whether jax runs on CPU; starts it only where an accelerator and its plugin are."""
  if platforms := jax.config.values["jax_platforms"]:
    return platforms.startswith("cpu")
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
    return True
  if not any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
    return True
  return jax.default_backend() == "cpu"


def memory_in_use() -> str:
  """Returns the memory in use on this process's first device, such as "1.2 GiB".

  Where jax does not count it (CPU), returns that of the process: "1.2 GiB (host)".
  """
  try:
    counted = jax.local_devices()[0].memory_stats()
  except jax.errors.JaxRuntimeError:  # of a platform that does not count
    counted = None
  if counted is not None and "bytes_in_use" in counted:
    return _gibibytes(counted["bytes_in_use"])
  try:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
  except OSError:  # not Linux
    return "unknown"
  return f"{_gibibytes(pages * resource.getpagesize())} (host)"


def _gibibytes(count: int) -> str:
  return f"{count / 2**30:.1f} GiB"
