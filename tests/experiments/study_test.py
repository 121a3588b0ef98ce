"""The frame of a study: tables that are gone on with, and pages made from them alone."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study import Finding, Study, main, measure_points
from jaxlm.config import OptimizerConfig, TrainConfig, check
from jaxlm.scaling.sweep import read_table, sweep
from jaxlm.train import IndexedBatches, Start, Task, Weighted

MADE = []


class Square(Task):
  """Minimises w^2; the module's list keeps the configurations that it was made of."""

  def init(self, key):
    return Start({"w": jnp.ones(1)})

  def batches(self, rows):
    return IndexedBatches(lambda index: np.ones(1, np.float32))

  def objective(self, params, model_state, batch, key):
    return {"loss": Weighted((params["w"] ** 2).sum(), batch.sum())}


def make_square(config):
  MADE.append(config)
  return config, Square()


def measure(scale, table, executor):
  grid = {"optimizer.learning_rate": [1e-3, 2e-3], "seed": [0]}
  config = TrainConfig(steps=3, batch=1, optimizer=OptimizerConfig(warmup=1, weight_decay=0.0))
  sweep(config, grid, table, make_task=make_square, executor=executor)


def conclude(rows):
  check(len(rows) > 1, "rows", len(rows), "two are needed")
  loss = min(row["loss"] for row in rows)
  return Finding(ours=f"{loss:.2f}", interval="0 to 1", verdict="reproduced", why="It falls.")


def draw(rows, figure):
  figure.subplots().plot([row["loss"] for row in rows])


TEXTS = ("title", "source", "claim", "published", "setting", "refuted_by", "cannot_show")
STUDY = Study(
  name="square",
  measure=measure,
  conclude=conclude,
  draw=draw,
  **{name: f"The {name}." for name in TEXTS},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("square")
  main(STUDY, ["--cpu", "--out", str(out)])
  return out


def test_a_run_leaves_table_figure_and_both_pages(folder):
  page = json.loads((folder / "study.json").read_text())
  assert [page[name] for name in TEXTS] == [f"The {name}." for name in TEXTS]
  (result,) = page["results"]
  assert (result["verdict"], result["runs"], result["diverged"]) == ("reproduced", 2, 0)
  assert result["commit"] and "core" in result["hardware"] and "jax" in result["versions"]
  assert (folder / result["figure"]).stat().st_size > 5000
  readme = (folder / "README.md").read_text()
  for text in (*(f"The {name}." for name in TEXTS[1:]), "It falls.", "0 to 1", "run --cpu"):
    assert text in readme


def test_finished_rows_are_skipped_and_lost_ones_run_again(folder, tmp_path):
  lines = (folder / "table.csv").read_text().splitlines(keepends=True)
  (tmp_path / "table.csv").write_text("".join(lines[:-1]))
  before = len(MADE)
  main(STUDY, ["--cpu", "--out", str(tmp_path)])
  again = [config.optimizer.learning_rate for config in MADE[before:]]
  assert set(again) == {2e-3}
  assert len((tmp_path / "table.csv").read_text().splitlines()) == 3
  before = len(MADE)
  main(STUDY, ["--cpu", "--out", str(tmp_path)])
  assert len(MADE) == before


def test_plot_needs_the_table_alone_and_too_few_rows_are_undecided(folder, tmp_path):
  lines = (folder / "table.csv").read_text().splitlines(keepends=True)
  (tmp_path / "table.csv").write_text("".join(lines[:-1]))
  nothing = dataclasses.replace(STUDY, measure=None)
  main(nothing, ["--plot", "--out", str(tmp_path)])
  (result,) = json.loads((tmp_path / "study.json").read_text())["results"]
  assert result["verdict"] == "undecided" and "rows=1: two are needed" in result["why"]
  main(nothing, ["--plot", "--out", str(tmp_path / "new")])
  assert "Not run yet" in (tmp_path / "new/README.md").read_text()


def test_points_that_are_measured_join_the_table_and_are_measured_once(folder, tmp_path):
  table = tmp_path / "table.csv"
  table.write_text((folder / "table.csv").read_text())
  measured = []

  def measure(context):
    measured.append(context)
    return {"bytes": 8 * context}

  for contexts in ([2], [2, 4]):
    measure_points([{"task.context": c} for c in contexts], table, measure)
  assert measured == [2, 4]
  *trained, first, second = read_table(table)
  assert len(trained) == 2 and all(row["task.context"] is None for row in trained)
  assert (first["bytes"], second["bytes"]) == (16, 32) and first["loss"] is None
  assert second["status"] == "finished" and second["commit"] and second["seconds"] >= 0
