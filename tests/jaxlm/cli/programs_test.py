"""Compiled programs are kept for the next process, within bounds, and only where nobody chose."""

import os
from pathlib import Path

import pytest

from benchmarks.reliability.processes import SMALL, finish, run, start_python, write_corpus
from jaxlm.cli.programs import prune

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

UNSET = """
import os
os.environ.pop("JAX_COMPILATION_CACHE_DIR")
"""
ASK = """
import os, sys
from jaxlm.cli.programs import keep_compiled_programs
keep_compiled_programs()
print(os.environ.get("JAX_COMPILATION_CACHE_DIR"), "jax" in sys.modules)
"""


def asked(folder: Path, script: str = ASK, **environment: str) -> str:
  """What the script prints without a folder for programs, unless the environment names one."""
  chosen = "JAX_COMPILATION_CACHE_DIR" in environment
  process = start_python(folder, "-c", script if chosen else UNSET + script, **environment)
  status, printed = finish(folder, process)
  assert status == 0, printed
  return printed.strip()


def test_the_folder_is_the_users_and_of_this_processor(tmp_path):
  where, has_jax = asked(tmp_path, XDG_CACHE_HOME=str(tmp_path)).split()
  assert Path(where).parent == tmp_path / "jaxlm/programs" and Path(where).is_dir()
  assert has_jax == "False"


def test_what_somebody_chose_stays(tmp_path):
  assert asked(tmp_path, JAX_COMPILATION_CACHE_DIR="mine").startswith("mine ")
  (tmp_path / "file").touch()  # a cache that cannot be written to
  assert asked(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file")).startswith("None ")


@pytest.mark.slow
def test_where_jax_is_imported_before_nothing_is_chosen(tmp_path):
  assert asked(tmp_path, "import jax" + ASK, XDG_CACHE_HOME=str(tmp_path)).startswith("None ")


def test_the_oldest_programs_go_where_there_are_too_many(tmp_path):
  for age in range(10):
    path = tmp_path / f"program{age}"
    path.write_bytes(bytes(100))
    os.utime(path, (1000 - age, 1000 - age))
  prune(tmp_path, 1000)
  assert len(list(tmp_path.iterdir())) == 10
  prune(tmp_path, 999)
  assert sorted(path.name for path in tmp_path.iterdir()) == [f"program{age}" for age in range(4)]


LISTEN = """
from jaxlm.cli.programs import keep_compiled_programs
keep_compiled_programs()
import jax
jax.monitoring.register_event_listener(lambda name, **_: print(name))
"""


@pytest.mark.slow
def test_a_resume_compiles_nothing_that_the_run_has_compiled(tmp_path):
  write_corpus(tmp_path / "text")
  train = ["train", "micro", *SMALL, "--run", "run", "--steps", "2"]
  hits = []
  for arguments in (train, ["resume", "run", "--steps", "4"]):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    status, printed = run(tmp_path, *arguments, setup=UNSET + LISTEN, **cache)
    assert status == 0, printed
    hits.append(printed.count("/jax/compilation_cache/cache_hits"))
  assert hits[1] >= hits[0] + 2  # the step and the evaluation
