"""Malloc is told what to keep before jax starts the threads that would not listen later."""

from benchmarks.reliability.processes import finish, start_python

PROGRAM = """
import dataclasses
from jax._src import xla_bridge
from jaxlm import presets
from jaxlm.run import memory, start
asked = []
memory.keep_freed_memory = lambda: asked.append(xla_bridge.backends_are_initialized())
config = presets.micro()
start.check_run(config)
assert xla_bridge.backends_are_initialized()
start.check_run(dataclasses.replace(config, keep_freed_memory=False))
print(asked)
"""


def test_memory_is_kept_from_before_jax_starts(tmp_path):
  status, printed = finish(tmp_path, start_python(tmp_path, "-c", PROGRAM))
  assert (status, printed.splitlines()[-1]) == (0, "[False]"), printed
