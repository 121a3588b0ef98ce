"""Malloc is told what to keep before jax starts the threads that would not listen later."""

import pytest

from benchmarks.reliability.processes import finish, start_python

PROGRAM = """
import sys
from jax._src import xla_bridge
from jaxlm.cli import main
from jaxlm.run import memory, start
def keep_freed_memory():
  sys.exit(f"asked, jax has started: {xla_bridge.backends_are_initialized()}")
memory.keep_freed_memory = keep_freed_memory
main()
"""
TRAIN = ["train", "micro", "--run", "run"]


@pytest.mark.parametrize(
  "flags, printed",
  [([], "asked, jax has started: False"), (["--no-keep_freed_memory", "--batch", "7"], "batch=7")],
)
def test_memory_is_kept_from_before_jax_starts(tmp_path, flags, printed):
  process = start_python(tmp_path, "-c", PROGRAM, *TRAIN, *flags, JAX_NUM_CPU_DEVICES="2")
  assert printed in finish(tmp_path, process)[1]
