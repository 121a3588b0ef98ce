"""Keeps the programs that jax compiles, so that a resume and the next run start without compiling.

Imports no jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

from jaxlm.paths import user_cache

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_MOST = 2**30
"""bytes of all programs of one kind of processor; beyond, the oldest go until half are left"""


def keep_compiled_programs() -> None:
  """Names a folder for jax's compilation cache, unless the environment or a program has chosen.

  Each kind of processor has its own, because a program may use instructions that another lacks.
  JAX_ENABLE_COMPILATION_CACHE=false switches the cache off; on several CPU devices, where it is not
  sound, `sharding.make_mesh` does.
  """
  if _VARIABLE in os.environ or "jax" in sys.modules:
    return
  try:
    folder = user_cache() / "programs" / _processor()
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder, _MOST)
  except (OSError, RuntimeError):  # no home, or none that can be written to
    return
  os.environ[_VARIABLE] = str(folder)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def prune(folder: Path, most: int) -> None:
  """Removes the files that were written first, where all have over `most` bytes, to half of it."""
  files = [(entry.stat(), entry.path) for entry in os.scandir(folder) if entry.is_file()]
  size = sum(status.st_size for status, _ in files)
  if size <= most:
    return
  for status, path in sorted(files, key=lambda file: file[0].st_mtime):
    if size <= most // 2:
      return
    with contextlib.suppress(FileNotFoundError):  # another process prunes too
      os.unlink(path)
    size -= status.st_size


def _processor() -> str:
  """Returns a name for the processor's kind and instructions."""
  described = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):  # not Linux
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = ("flags", "Features", "model name")
    described += sorted({line for line in lines if line.startswith(kinds)})
  return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
