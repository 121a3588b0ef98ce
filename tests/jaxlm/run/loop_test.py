"""Whole runs: what they leave on disk; a resumed run is the run that was never interrupted."""

import dataclasses
import json
import logging
import math
import shutil

import chex
import jax
import numpy as np
import pytest

from jaxlm.checkpoint.checkpoint import restore
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  PipelineConfig,
  TrainConfig,
  decoder,
)
from jaxlm.config_json import to_dict
from jaxlm.data.loader import load_text, train_loader
from jaxlm.run import resume, train
from jaxlm.run.resolve import check_mesh
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def config(corpus) -> TrainConfig:
  return TrainConfig(
    steps=10,
    batch=8,
    accumulate=2,
    save_every=5,
    eval_every=5,
    eval_batches=1,
    ema=0.9,
    mesh=MeshConfig(data=1),
    model=decoder(D=16, F=24, N=4, K=2, H=4, layers=2),
    compute=ComputeConfig(scan="always"),
    data=DataConfig(source=str(corpus), length=32, layout="packed", holdout=0.2),
    optimizer=OptimizerConfig(warmup=2, learning_rate=1e-2, eps=1e-4),
  )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """(folder, result) of ten steps without interruption."""
  run = tmp_path_factory.mktemp("runs") / "whole"
  return RunFolder(run), train(dataclasses.replace(config, run=str(run)))


@pytest.fixture
def copy(whole, tmp_path) -> RunFolder:
  shutil.copytree(whole[0].path, tmp_path / "copy")
  return RunFolder(tmp_path / "copy")


def flip_a_bit(folder: RunFolder, step: int) -> None:
  """In the middle of the largest file of the parameters' arrays."""
  files = (checkpoint_path(folder.checkpoints, step) / "params").rglob("*")
  path = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def state_and_position(folder: RunFolder, step: int):
  config = folder.read_config()
  with jax.set_mesh(make_mesh(config.mesh)):
    like = jax.eval_shape(lambda: init_state(config, TextTask(config)))
    state, position = restore(checkpoint_path(folder.checkpoints, step), like)
  key = np.asarray(jax.random.key_data(state.key))
  return jax.device_get(state._replace(key=None)), key, position


def test_a_run_leaves_what_it_promises(whole, config):
  folder, result = whole
  assert {path.name for path in folder.path.iterdir()} >= {
    "config.json",
    "metrics.jsonl",
    "eval.jsonl",
    "log.txt",
  }
  assert folder.read_config() == result.config
  assert result.finished and result.step == 10
  assert finished_steps(folder.checkpoints) == [5, 10]
  evals = list(read_records(folder.evals))
  assert [record["step"] for record in evals] == [5, 10]
  assert evals[-1] == {"step": 10, **result.evaluation}
  assert set(result.evaluation) == {"heldout_loss", "bits_per_byte", "tokens"}
  assert "training:" in folder.log.read_text() and "heldout_loss" in folder.log.read_text()


def test_metrics_have_one_object_per_step(whole, config):
  folder, result = whole
  records = [json.loads(line) for line in folder.metrics.open()]
  assert [record["step"] for record in records] == list(range(1, 11))
  kinds = {
    "step": int,
    "loss": float,
    "tokens": int,
    "seconds": float,
    "learning_rate": float,
    "grad_norm": float,
  }
  kinds |= {"data_seconds": float, "skipped": int, "spike": int}
  batches = train_loader(load_text(config.data), batch=config.batch, seed=config.seed)
  for record in records:
    assert {name: type(value) for name, value in record.items()} == kinds
    assert record["tokens"] == next(batches).weights_BT.sum()
    assert record["seconds"] > record["data_seconds"] and math.isfinite(record["grad_norm"])
  assert records[-1]["loss"] == result.metrics["loss"] < records[0]["loss"] - 0.3
  rates = [record["learning_rate"] for record in records]
  assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and rates[-1] < 3e-3


def test_the_result_holds_the_moving_average_where_there_is_one(whole):
  folder, result = whole
  state, _, _ = state_and_position(folder, 10)
  chex.assert_trees_all_equal(jax.device_get(result.params), state.ema)
  with pytest.raises(AssertionError, match="differ"):
    chex.assert_trees_all_equal(state.ema, state.params)


def test_damage_is_noticed_and_the_run_repeated_from_the_older_checkpoint_bit_for_bit(whole, copy):
  """5 steps, restart, 5 steps equal 10: a bit of the newest checkpoint, step 10, is flipped."""
  flip_a_bit(copy, 10)
  result = resume(copy.path)
  assert "resuming at step 5" in copy.log.read_text()
  assert (copy.checkpoints / "00000010.unsound").is_dir()
  assert finished_steps(copy.checkpoints) == [5, 10]

  want_folder, want = whole
  (state, key, position), (want_state, want_key, want_position) = (
    state_and_position(folder, 10) for folder in (copy, want_folder)
  )
  chex.assert_trees_all_equal(state, want_state)
  np.testing.assert_array_equal(key, want_key)
  assert position == want_position
  assert result.metrics == want.metrics and result.evaluation == want.evaluation
  assert without_seconds(copy) == without_seconds(want_folder)
  assert list(read_records(copy.evals)) == list(read_records(want_folder.evals))


def without_seconds(folder: RunFolder) -> list[dict]:
  return [
    {name: value for name, value in record.items() if "seconds" not in name}
    for record in read_records(folder.metrics)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4)], ids=lambda m: m.describe()
)
def test_the_second_half_on_another_mesh_is_the_same_run(whole, copy, mesh):
  shutil.rmtree(checkpoint_path(copy.checkpoints, 10))
  copy.write_config(dataclasses.replace(copy.read_config(), mesh=mesh))
  resume(copy.path)
  want_folder, _ = whole
  (state, _, position), (want_state, _, want_position) = (
    state_and_position(f, 10) for f in (copy, want_folder)
  )
  assert position == want_position

  def compare(path, got, want):
    np.testing.assert_allclose(
      got, want, rtol=0, atol=1e-6 * max(1, np.abs(want).max()), err_msg=jax.tree_util.keystr(path)
    )

  jax.tree_util.tree_map_with_path(compare, state, want_state)
  losses, want_losses = (
    [record["loss"] for record in read_records(f.metrics)] for f in (copy, want_folder)
  )
  np.testing.assert_allclose(losses, want_losses, rtol=1e-6)


def test_an_unfinished_checkpoint_is_passed_over(copy):
  (checkpoint_path(copy.checkpoints, 10) / "manifest.json").unlink()
  assert finished_steps(copy.checkpoints) == [5]
  with pytest.raises(ValueError, match="steps=5: the run is at step 5; raise --steps"):
    resume(copy.path, steps=5)


def test_a_finished_run_asks_for_more_steps(copy):
  with pytest.raises(ValueError, match="steps=10: the run is at step 10; raise --steps"):
    resume(copy.path)


def test_a_run_without_a_sound_checkpoint_cannot_be_resumed(copy):
  flip_a_bit(copy, 5)
  flip_a_bit(copy, 10)
  with pytest.raises(FileNotFoundError, match="no checkpoint that verifies"):
    resume(copy.path)
  assert {path.name for path in copy.checkpoints.iterdir()} == {
    "00000005",
    "00000010",
  }  # nothing moved, nothing lost


def test_a_used_folder_is_refused(whole, config, tmp_path):
  with pytest.raises(
    ValueError, match=r"run='.*whole': must be a new or empty folder.*jaxlm resume"
  ):
    train(dataclasses.replace(config, run=str(whole[0].path)))
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="not a run"):
    train(dataclasses.replace(config, run=str(tmp_path)))
  with pytest.raises(ValueError, match="run=''"):
    train(dataclasses.replace(config, run=""))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, tmp_path):
  wild = dataclasses.replace(config.optimizer, learning_rate=1e30, clip=0.0)
  run = tmp_path / "wild"
  with pytest.raises(FloatingPointError, match=r"step 2: loss .*, gradient norm nan"):
    train(dataclasses.replace(config, run=str(run), optimizer=wild))
  records = list(read_records(RunFolder(run).metrics))
  assert [record["step"] for record in records] == [1, 2] and math.isnan(records[1]["grad_norm"])
  assert finished_steps(RunFolder(run).checkpoints) == []
  ours = [
    handler
    for handler in logging.getLogger("jaxlm").handlers
    if isinstance(handler, logging.FileHandler)
  ]
  assert not ours  # the log file is closed whatever happens


WRONG_MESHES = [
  (dict(mesh=MeshConfig(data=1, expert=2)), r"mesh\.expert=2: the model does not use this axis"),
  (
    dict(pipeline=PipelineConfig(layers_per_stage=(2, 2))),
    r"pipeline\.layers_per_stage=\(2, 2\): there is one stage",
  ),
  (
    dict(mesh=MeshConfig(data=1, stage=2), pipeline=PipelineConfig(schedule="zb_v")),
    r"pipeline\.schedule='zb_v': with accumulate=2 .* mesh\.stage=2: .* needs at least 2 P - 1 = 3",
  ),
  (
    dict(mesh=MeshConfig(data=1, stage=8)),
    r"mesh\.stage=8: the model has fewer repeats of layers, \d",
  ),
  (
    dict(mesh=MeshConfig(data=1, context_ulysses=3)),
    r"model\.D=16: must be a multiple of mesh\.context_ulysses=3",
  ),
  (dict(mesh=MeshConfig(data=8)), r"batch=8: must be a multiple of 8 batch shards x accumulate=2"),
  (
    dict(mesh=MeshConfig(data=1, tensor=4)),
    r"model\.pattern\.0\.mixer\.K=2: must be a multiple of mesh\.tensor=4",
  ),
  (
    dict(mesh=MeshConfig(data=1, fsdp=3), batch=6),
    r"model\.D=16: must be a multiple of mesh\.fsdp=3",
  ),
  (dict(mesh=MeshConfig(data=3, tensor=4)), "needs 12 devices, there are 8"),
]


@pytest.mark.parametrize(
  "changes, message", WRONG_MESHES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
  config, tmp_path, changes, message
):
  config = dataclasses.replace(config, run=str(tmp_path / "run"), **changes)
  with pytest.raises(ValueError, match=message):
    train(config)
  assert not (tmp_path / "run").exists()


def test_a_length_that_the_tensor_axis_does_not_divide_is_refused(config):
  with pytest.raises(ValueError, match=r"data\.length=31: must be a multiple of mesh\.tensor=2"):
    check_mesh(
      dataclasses.replace(
        config, mesh=MeshConfig(data=1, tensor=2), data=dataclasses.replace(config.data, length=31)
      )
    )


def test_config_json_is_the_whole_configuration(whole):
  folder, result = whole
  assert json.loads(folder.config.read_text()) == json.loads(json.dumps(to_dict(result.config)))
