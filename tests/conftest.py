"""Every test sees 8 virtual CPU devices and strict broadcasting.

Slow tests run the programs that users run, but for modules that ask for `compile_in_less_time`.
Quick ones switch most of XLA's optimisations off and take its older code generator, where jax still
has it: that leaves a fifth of compile time, which is most of what they take. A program that several
tests need, such as the training step of the smallest preset, is compiled once per process. What
else every small program costs is paid less often: setting up MLIR, and Python's search for cycles,
which tracing sets off.
"""

import functools
import gc
import os
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu, where installed, only compiles here
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import time
from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src import cache_key, compiler
from jax._src.interpreters import mlir

from benchmarks.reliability.processes import write_corpus

gc.set_threshold(100_000, 10, 10)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# programs of several CPU devices that come from the cache hang (see sharding.make_mesh)
jax.config.update("jax_enable_compilation_cache", False)

compile_anew = compiler.compile_or_get_cached
compiled_programs = {}
LONG, MOST = 0.2, 200  # seconds; programs
PLAIN = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""options of XLA for quick tests; jax 0.12 has the newer code generator only"""
if jax.__version_info__ >= (0, 11):
  PLAIN = {}
MAPS = 30_000  # pieces of memory, a dozen for each program; Linux grants a process 65,530


def compile_once(backend, program, devices, options, host_callbacks, *others):
  """Returns what this process compiled before for the same program, options and devices.

  jax keeps a compiled program with the function that was traced: a test that builds the same
  step from its configuration again compiles it again. The newest that took long are kept.
  """
  arguments = backend, program, devices, options, host_callbacks, *others
  if backend.platform != "cpu":
    return compile_anew(*arguments)
  if jax.config.values["jax_disable_most_optimizations"]:
    options.env_option_overrides = [*options.env_option_overrides, *PLAIN.items()]
  if host_callbacks:
    return compile_anew(*arguments)
  key = cache_key.get(program, devices, options, backend)
  if key in compiled_programs:
    return compiled_programs[key]
  start = time.perf_counter()
  compiled = compile_anew(*arguments)
  if time.perf_counter() - start > LONG:
    compiled_programs[key] = compiled
    if len(compiled_programs) > MOST:
      del compiled_programs[next(iter(compiled_programs))]
  return compiled


compiler.compile_or_get_cached = compile_once

new_context = mlir.make_ir_context
context_of_thread = functools.cache(lambda thread: new_context())
if jax.__version_info__ < (0, 11):  # newer ones use a context more than once by themselves
  mlir.make_ir_context = lambda: context_of_thread(threading.get_ident())

# no deadline: the first example compiles, and machines are busy
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def pytest_collection_finish(session):
  """Compiles what users run as soon as one of the tests to come is slow."""
  slow = any(item.get_closest_marker("slow") for item in session.items)
  jax.config.update("jax_disable_most_optimizations", not slow)
  gc.freeze()  # modules and tests live as long as the process


def pytest_unconfigure():
  gc.freeze()  # what is left goes with the process, without a search for cycles


@pytest.fixture(scope="module")
def compile_in_less_time():
  """Compiles slow tests like quick ones, here and in processes that they start.

  For modules that compare numbers, whatever program of XLA computes them.
  """
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  jax.devices()  # XLA has read its flags for this process
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = [f"--{name}={str(value).lower()}" for name, value in PLAIN.items()]
    patch.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip())
    yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def compile_as_users_get_it(monkeypatch):
  """Compiles what users run for one test of a module that asks for `compile_in_less_time`.

  Only what is compiled within the test; processes that it starts are such programs, too.
  """
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", False)
  monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
  """The folder of a tiny corpus: 40 Python files, about 3 kB. Tests leave it as it is."""
  return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module", autouse=True)
def few_maps():
  """Lets go of what was compiled before the process runs out of maps, where XLA would crash."""
  yield
  context_of_thread.cache_clear()
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
    compiled_programs.clear()
    jax.clear_caches()
