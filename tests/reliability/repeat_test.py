"""A configuration and a seed give one run: twice, on every axis of a mesh, however data is read.

Runs are compiled as users get them.
"""

import dataclasses
import functools
import json
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm.run.environment as environment
from benchmarks.reliability.comparison import records, same_end
from benchmarks.reliability.processes import run
from benchmarks.reliability.repeats import MESHES, Repeats, deviation, first_run, mesh_flags
from jaxlm.cli import main
from jaxlm.config import DataConfig, MeshConfig
from jaxlm.data.loader import load_text, train_loader
from jaxlm.run.run_folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Repeats:
  return first_run(tmp_path_factory.mktemp("repeat") / "runs", 12)


@pytest.fixture(scope="module", params=["windows", "packed"])
def text(request, corpus):
  return load_text(DataConfig(source=str(corpus), length=16, layout=request.param))


BATCH = 8


@pytest.fixture(scope="module")
def straight(text):
  """Returns the first batches of a seed's order, read by one process without a restart."""

  @functools.cache
  def batches(seed):
    loader = train_loader(text, batch=BATCH, seed=seed)
    return [next(loader) for _ in range(12)]

  return batches


@settings(max_examples=10)
@given(data=st.data())
def test_data_order_depends_on_nothing_but_the_seed(text, straight, data):
  """Draws reader threads, the number of processes, and where and how often a run is restarted."""
  seed = data.draw(st.integers(0, 3))
  want = straight(seed)
  parts = data.draw(st.sampled_from([1, 2, 4]))
  size, got = BATCH // parts, []
  for start in range(0, BATCH, size):
    state, mine = None, []
    while len(mine) < len(want):
      threads = data.draw(st.integers(1, 4))
      again = dataclasses.replace(text, config=dataclasses.replace(text.config, threads=threads))
      loader = train_loader(again, batch=BATCH, seed=seed, rows=slice(start, start + size))
      if state is not None:
        loader.set_state(json.loads(json.dumps(state)))
      mine += [
        next(loader) for _ in range(min(data.draw(st.integers(1, 12)), len(want) - len(mine)))
      ]
      state = loader.get_state()
    got.append(mine)
  for step, batch in enumerate(want):
    for field, array in enumerate(batch):
      if array is not None:
        np.testing.assert_array_equal(np.concatenate([part[step][field] for part in got]), array)


@pytest.mark.slow
def test_config_json_alone_repeats_a_run_bit_for_bit(runs):
  """Repeats 12 steps, two evaluations and the final state in another process."""
  again = runs.again()
  assert len(records(runs.first)) == 12 and same_end(again, runs.first)
  assert again.read_config() == dataclasses.replace(runs.first.read_config(), run="again")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[-2:], ids=MeshConfig.describe)
def test_every_axis_has_the_losses_of_one_device(runs, mesh, monkeypatch):
  """Each axis is in one of these meshes. Sums are rounded in another order, no more."""
  monkeypatch.chdir(runs.folder)
  flags = mesh_flags(mesh)
  assert main(["train", "first/config.json", *flags]) == 0
  other = RunFolder(runs.folder / flags[1])
  assert deviation(other, runs.first, "loss") < 1e-6
  assert deviation(other, runs.first, "grad_norm") < 1e-6


def test_the_environment_of_each_start_is_kept_and_another_one_is_said(
  first_start, tmp_path, monkeypatch
):
  folder, config = first_start
  (start,) = environment.starts(folder)
  assert (
    start["packages"]["jax"]
    and start["python"]
    and start["processes"] == 1
    and start["chip"] == "cpu"
  )
  assert start["config"]["model"]["D"] == config.model.D and start["step"] == 0
  assert environment.record_start(folder, 3, config) == []
  monkeypatch.setattr(environment, "_version", (start["packages"] | {"flax": "0.0.1"}).get)
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  changes = environment.record_start(folder, 5, dataclasses.replace(config, steps=99))
  assert changes == [
    f"packages.flax: {start['packages']['flax']} -> 0.0.1",
    "flags.XLA_FLAGS: None -> --xla_cpu_enable_fast_math=false",
    "config.steps: 50 -> 99",
  ]
  assert [start["step"] for start in environment.starts(folder)] == [0, 3, 5]


@pytest.fixture
def first_start(tmp_path, monkeypatch):
  from jaxlm import presets

  monkeypatch.delenv("XLA_FLAGS", raising=False)
  folder, config = RunFolder(tmp_path), presets.micro()
  environment.record_start(folder, 0, config)
  return folder, config


def test_the_commit_is_that_of_the_checkout_itself(tmp_path):
  assert environment.commit(tmp_path) is None
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
  (tmp_path / "file").write_text("1")
  for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
    subprocess.run([*git, *command], check=True)
  first = environment.commit(tmp_path)
  assert len(first) == 40
  (tmp_path / "file").write_text("2")
  assert environment.commit(tmp_path) == first + "+changes"
  (tmp_path / "below").mkdir()
  assert (
    environment.commit(tmp_path / "below") is None
  )  # a package inside somebody else's repository


@pytest.mark.slow
def test_a_resume_under_other_versions_says_so_on_the_terminal_and_in_the_log(runs):
  older = json.loads(runs.first.environment.read_text())
  older[-1]["packages"]["optax"] = "0.1.0"
  runs.first.environment.write_text(json.dumps(older))
  status, printed = run(runs.folder, "resume", "first", "--steps", "14")
  assert status == 0, printed
  for text in (printed, runs.first.log.read_text()):
    assert "differs from the start before: packages.optax: 0.1.0 -> " in text
    assert "config.steps: 12 -> 14" in text
