"""A task of one's own through `fit`: records, checkpoints, resume, plot; nothing in it is text."""

import dataclasses
import io
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoint.checkpoint import restore
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.config import MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.run import fit
from jaxlm.run.guard import load_batch
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.train import IndexedBatches, Start, Task, Weighted, init_state
from pallas_kernels.common.errors import UserError
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


class Line(Task):
  """Fits x w = 2 sum(x) under noise that the key draws; a frozen matrix stands before w."""

  unit = "points"

  def init(self, key):
    return Start({"w": jnp.zeros(3)}, {"scale": jnp.eye(3)}, {"seen": jnp.int32(0)})

  def batches(self, rows):
    return IndexedBatches(
      lambda index: {"x": np.random.default_rng(index).normal(size=(8, 3))[rows]}
    )

  def objective(self, params, model_state, batch, key):
    target_B = 2 * batch["x"].sum(axis=1) + 0.1 * jax.random.normal(key, batch["x"].shape[:1])
    error_B = batch["x"] @ params["scale"] @ params["w"] - target_B
    terms = {"loss": Weighted(jnp.sum(error_B**2), jnp.float32(len(error_B)))}
    return terms | {"largest": Weighted(jnp.abs(batch["x"]).max(axis=0), jnp.float32(1), 0.0)}

  def after_update(self, params, model_state, metrics):
    return params, {"seen": model_state["seen"] + 1}

  def evaluate(self, params, model_state, rows):
    distance = float(jnp.abs(params["scale"] @ params["w"] - 2).max())
    return {"distance": distance, "seen": int(model_state["seen"])}

  def references(self):
    return {"noise": 0.03}


CONFIG = TrainConfig(
  steps=12,
  batch=8,
  accumulate=2,
  save_every=6,
  eval_every=6,
  ema=0.5,
  mesh=MeshConfig(data=1),
  optimizer=OptimizerConfig(learning_rate=0.2, warmup=2, weight_decay=0.0),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  config = dataclasses.replace(CONFIG, run=str(tmp_path_factory.mktemp("runs") / "whole"))
  return RunFolder(tmp_path_factory.getbasetemp() / config.run), fit(config, Line())


def state_of(folder: RunFolder, step: int):
  config = folder.read_config()
  with jax.set_mesh(make_mesh(config.mesh)):
    like = jax.eval_shape(lambda: init_state(config, Line()))
    state, position = restore(checkpoint_path(folder.checkpoints, step), like)
  return jax.device_get(state._replace(key=jax.random.key_data(state.key))), position


def records(folder: RunFolder) -> list[dict]:
  return [
    {name: value for name, value in record.items() if "seconds" not in name}
    for record in read_records(folder.metrics)
  ]


def test_metrics_and_evaluations_are_the_tasks_own(whole):
  folder, result = whole
  assert [record["step"] for record in records(folder)] == list(range(1, 13))
  names = {"step", "loss", "points", "grad_norm", "learning_rate", "skipped", "spike"}
  assert all(set(record) == names for record in records(folder))  # arrays are not recorded
  assert all(record["points"] == 8 for record in records(folder))
  evals = list(read_records(folder.evals))
  assert [record["step"] for record in evals] == [6, 12]
  assert evals[-1] == {"step": 12, **result.evaluation} and evals[-1]["seen"] == 12
  assert result.metrics["loss"] == records(folder)[-1]["loss"] < records(folder)[0]["loss"] / 2
  assert set(result.params) == {"w", "scale"} and int(result.model_state["seen"]) == 12


def test_each_part_of_the_state_is_an_item_of_the_checkpoint(whole):
  folder, _ = whole
  items = {path.name for path in checkpoint_path(folder.checkpoints, 12).iterdir() if path.is_dir()}
  parts = {"params", "frozen", "model_state", "opt_state", "ema", "key", "step", "hyper"}
  assert items == parts | {"data"}
  state, position = state_of(folder, 12)
  assert position == {"next_index": 12} and int(state.step) == 12
  assert float(state.hyper.learning_rate) == pytest.approx(0.2) and int(state.hyper.steps) == 12


def test_the_plot_has_the_loss_and_each_value_of_the_evaluation(whole, monkeypatch):
  pytest.importorskip("matplotlib")
  from matplotlib.figure import Figure

  from jaxlm.run.plot import draw_loss

  drawn = []
  monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
  folder, _ = whole
  assert folder.plot.is_file()
  draw_loss(folder, Line().references())
  loss, distance = drawn[0].axes
  assert loss.get_ylabel() == "loss" and "noise 0.03" in [text.get_text() for text in loss.texts]
  assert distance.get_title(loc="left") == "distance"


def test_a_run_that_was_cut_goes_on_bit_for_bit(whole, tmp_path):
  folder, result = whole
  shutil.copytree(folder.path, tmp_path / "cut")
  cut = RunFolder(tmp_path / "cut")
  shutil.rmtree(checkpoint_path(cut.checkpoints, 12))
  again = fit(dataclasses.replace(result.config, run=str(cut.path)), Line(), resume=True)
  assert again.metrics == result.metrics and again.evaluation == result.evaluation
  assert records(cut) == records(folder)
  chex.assert_trees_all_equal(state_of(cut, 12), state_of(folder, 12))


def test_a_resumed_run_takes_hyperparameters_from_the_configuration(whole, tmp_path):
  folder, result = whole
  shutil.copytree(folder.path, tmp_path / "longer")
  optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=0.05)
  config = dataclasses.replace(CONFIG, run=str(tmp_path / "longer"), steps=20, optimizer=optimizer)
  fit(config, Line(), resume=True)
  longer = RunFolder(tmp_path / "longer")
  state, _ = state_of(longer, 20)
  assert float(state.hyper.learning_rate) == pytest.approx(0.05) and int(state.hyper.steps) == 20
  assert records(longer)[12]["learning_rate"] < 0.05


def test_a_finished_run_and_a_new_folder_cannot_be_confused(whole, tmp_path):
  _, result = whole
  with pytest.raises(UserError, match="must be a new or empty folder"):
    fit(result.config, Line())
  with pytest.raises(UserError, match="steps=12: the run is at step 12"):
    fit(result.config, Line(), resume=True)
  with pytest.raises(UserError, match="not the folder of a run"):
    fit(dataclasses.replace(CONFIG, run=str(tmp_path / "none")), Line(), resume=True)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
  run = str(tmp_path / "run")
  late = dataclasses.replace(CONFIG.optimizer, warmup=12)
  for config, message in [
    (dataclasses.replace(CONFIG, run=""), "run=''"),
    (dataclasses.replace(CONFIG, run=run, optimizer=late), r"optimizer\.warmup=12: must be below"),
    (
      dataclasses.replace(CONFIG, run=run, mesh=MeshConfig(data=8)),
      r"batch=8: must be a multiple of 8 batch shards x accumulate=2",
    ),
  ]:
    with pytest.raises(UserError, match=message):
      fit(config, Line())
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_stop_the_run_and_keep_its_batch(tmp_path):
  class Breaking(Line):
    def batches(self, rows):
      whole = super().batches(rows).make_batch
      return IndexedBatches(lambda i: {"x": np.where(i == 4, np.nan, whole(i)["x"])})

  folder = RunFolder(tmp_path / "run")
  with pytest.raises(FloatingPointError, match="step 5: loss nan"):
    fit(dataclasses.replace(CONFIG, run=str(folder.path)), Breaking())
  assert np.isnan(load_batch(folder.bad_steps, 5)["x"]).all()
  assert finished_steps(folder.checkpoints) == []


class Gone(io.StringIO):
  """A terminal that is gone."""

  def write(self, text):
    raise OSError(5, "Input/output error")

  def flush(self):
    self.write("")

  def isatty(self):
    return True


def test_nothing_that_only_displays_ends_a_run(whole, tmp_path, monkeypatch):
  """The terminal is gone, the picture fails."""

  def fail(*arguments, **options):
    raise RuntimeError("broken")

  monkeypatch.setattr(sys, "stdout", Gone())
  monkeypatch.setattr(sys, "stderr", Gone())
  monkeypatch.setattr("jaxlm.run.loop.draw_loss", fail)
  folder = RunFolder(tmp_path / "run")
  result = fit(dataclasses.replace(CONFIG, run=str(folder.path)), Line())
  assert result.finished and result.saved == 12
  assert records(folder) == records(whole[0])
  assert "loss.png is not drawn" in folder.log.read_text()


@pytest.mark.slow
def test_the_same_task_on_eight_devices_is_the_same_run(whole, tmp_path):
  folder, result = whole
  mesh = MeshConfig(data=4)
  config = dataclasses.replace(CONFIG, run=str(tmp_path / "mesh"), mesh=mesh)
  assert fit(config, Line()).metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
