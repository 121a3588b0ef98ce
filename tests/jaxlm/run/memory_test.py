"""Malloc is told what to keep before jax starts the threads that would not listen later."""

import types

import pytest

from benchmarks.reliability.processes import finish, start_python
from jaxlm.run import memory

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


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, printed",
  [([], "asked, jax has started: False"), (["--no-keep_freed_memory", "--batch", "7"], "batch=7")],
)
def test_memory_is_kept_from_before_jax_starts(tmp_path, flags, printed):
  process = start_python(tmp_path, "-c", PROGRAM, *TRAIN, *flags, JAX_NUM_CPU_DEVICES="2")
  assert printed in finish(tmp_path, process)[1]


def test_a_plugin_without_its_chip_is_no_accelerator(monkeypatch):
  """The chip's file below /dev decides, so that jax is not started to find out."""
  calls: list[str] = []
  files: list[str] = []
  jax = types.SimpleNamespace(
    config=types.SimpleNamespace(values={"jax_platforms": None}),
    default_backend=lambda: calls.append("jax starts") or "tpu",
  )
  monkeypatch.setattr(memory, "jax", jax)
  monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(memory.Path, "glob", lambda self, pattern: iter(files))
  monkeypatch.setattr(memory, "keep_freed_memory", lambda: calls.append("malloc is told"))
  memory.keep_freed_memory_on_cpu()
  assert calls == ["malloc is told"]
  files.append("/dev/accel0")
  memory.keep_freed_memory_on_cpu()
  assert calls == ["malloc is told", "jax starts"]
