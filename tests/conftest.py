"""Every test sees 8 virtual CPU devices and strict broadcasting.

Slow tests run the programs that users run. Quick ones switch most of XLA's optimisations off:
that halves compile time, which is most of what they take.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu, where installed, only compiles here
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from pathlib import Path

import hypothesis
import jax
import pytest

from benchmarks.reliability.processes import write_corpus

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# programs of several CPU devices that come from the cache hang (see sharding.make_mesh)
jax.config.update("jax_enable_compilation_cache", False)
# no deadline: the first example compiles, and machines are busy
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def pytest_collection_finish(session):
  """Compiles what users run as soon as one of the tests to come is slow."""
  slow = any(item.get_closest_marker("slow") for item in session.items)
  jax.config.update("jax_disable_most_optimizations", not slow)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
  """The folder of a tiny corpus: 40 Python files, about 3 kB. Tests leave it as it is."""
  return write_corpus(tmp_path_factory.mktemp("corpus") / "text")
