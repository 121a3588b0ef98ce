"""Sweeps: rows, restarts, divergence, and the same numbers as single runs."""

import dataclasses
import importlib.metadata
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.run.together as together_module
import jaxlm.scaling.sweep as sweep_module
from jaxlm import presets
from jaxlm.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.run import fit, train
from jaxlm.run.environment import hardware
from jaxlm.scaling.grid import with_fields
from jaxlm.scaling.sweep import read_table, sweep
from jaxlm.train import IndexedBatches, Start, Task, Weighted
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CONFIG = TrainConfig(
  steps=6,
  batch=8,
  mesh=MeshConfig(data=1),
  optimizer=OptimizerConfig(learning_rate=0.1, warmup=2, weight_decay=0.0),
)


class Curve(Task):
  """Fits tanh(x w) = tanh(x 1), with a width from the configuration and data from the seed."""

  def __init__(self, config: TrainConfig):
    self.config = config

  def init(self, key):
    return Start({"w": jax.random.normal(key, (self.config.model.D,))})

  def roles(self, params):
    return {"w": "matrix"}

  def batches(self, rows):
    def draw(index: int) -> np.ndarray:
      key = [self.config.seed, index]
      return np.random.default_rng(key).normal(size=(8, self.config.model.D)).astype(np.float32)

    return IndexedBatches(draw)

  def objective(self, params, model_state, batch, key):
    error_B = jnp.tanh(batch @ params["w"]) - jnp.tanh(batch.sum(axis=1))
    return {"loss": Weighted(jnp.sum(error_B**2), jnp.float32(len(batch)))}

  def evaluate(self, params, model_state, rows):
    return {"distance": float(jnp.abs(params["w"] - 1).max())}


def make_curve(config: TrainConfig) -> tuple[TrainConfig, Task]:
  return config, Curve(config)


GRID = {
  "optimizer.learning_rate": [0.01, 0.3],
  "optimizer.weight_decay": [0.0, 0.5],
  "steps": [4, 6],
  "seed": [0, 3],
  "model.D": [2, 4],
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  table = tmp_path_factory.mktemp("sweep") / "table.csv"
  return table, sweep(CONFIG, GRID, table, make_task=make_curve)


def test_there_is_a_row_for_every_combination_in_the_order_of_the_grid(swept):
  table, rows = swept
  assert len(rows) == len(read_table(table)) == 32
  assert rows[0] | {"seconds": 0} == {
    "optimizer.learning_rate": 0.01,
    "optimizer.weight_decay": 0,
    "steps": 4,
    "seed": 0,
    "model.D": 2,
    "status": "finished",
    "step": 4,
    "examples": 32,
    "loss": rows[0]["loss"],
    "distance": rows[0]["distance"],
    "parameters": 2,
    "seconds": 0,
    "hardware": hardware(),
    "commit": rows[0]["commit"],
    "versions": f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
    "config": rows[0]["config"],
  }
  assert [row["model.D"] for row in rows] == [2, 4] * 16
  assert [row["steps"] for row in rows] == ([4] * 4 + [6] * 4) * 4
  assert len({row["config"] for row in rows}) == 32


def test_one_after_another_gives_the_same_rows(swept, tmp_path):
  _, rows = swept
  single = sweep(CONFIG, GRID, tmp_path / "t.csv", make_task=make_curve, together=False)
  for row, want in zip(single, rows, strict=True):
    assert list(row) == list(want)
    for name in row.keys() - {"seconds"}:
      near = name in ("loss", "distance")
      assert row[name] == (pytest.approx(want[name], abs=1e-6) if near else want[name]), name


def test_a_row_is_what_fit_ends_with(swept, tmp_path):
  _, rows = swept
  row = rows[26]
  config = with_fields(CONFIG, {name: row[name] for name in GRID})
  result = fit(dataclasses.replace(config, run=str(tmp_path / "run")), Curve(config))
  assert row["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
  assert row["distance"] == pytest.approx(result.evaluation["distance"], abs=1e-6)


@pytest.fixture
def trace_once_per_shape(monkeypatch):
  """trace_once_per_shape(n): from now on an error where steps are traced more than n times."""
  real = together_module.make_train_step

  def limit(shapes: int) -> list:
    chex.clear_trace_counter()
    made = []

    def make(config, task):
      made.append(chex.assert_max_traces(real(config, task), n=shapes))
      return made[-1]

    monkeypatch.setattr(together_module, "make_train_step", make)
    return made

  return limit


def test_equal_shapes_are_one_program_that_is_compiled_once(tmp_path, trace_once_per_shape):
  made = trace_once_per_shape(2)  # one for each model.D
  sweep(CONFIG, GRID | {"seed": [0]}, tmp_path / "t.csv", make_task=make_curve)
  assert len(made) == 2


def test_finished_rows_are_not_run_again(swept, tmp_path, monkeypatch):
  table, rows = swept
  lines = table.read_text().splitlines(keepends=True)
  (tmp_path / "t.csv").write_text("".join(lines[:-3]))
  sizes = []
  real = together_module.Together.train

  def recorded(self, configs):
    sizes.append(len(configs))
    return real(self, configs)

  monkeypatch.setattr(together_module.Together, "train", recorded)
  again = sweep(CONFIG, GRID, tmp_path / "t.csv", make_task=make_curve)
  assert sum(sizes) == 3
  assert [row["config"] for row in again] == [row["config"] for row in rows]
  losses = [row["loss"] for row in again]
  np.testing.assert_allclose(losses, [row["loss"] for row in rows], rtol=0, atol=1e-6)
  sweep(CONFIG, GRID, tmp_path / "t.csv", make_task=make_curve)
  assert sum(sizes) == 3


def test_a_digest_that_reads_as_a_number_is_found_again(swept, tmp_path):
  table, rows = swept
  digest = "73125e0446910023"
  text = table.read_text().replace(rows[0]["config"], digest)
  (tmp_path / "t.csv").write_text(text)
  assert read_table(tmp_path / "t.csv")[0]["config"] == digest


def test_another_configuration_is_another_row(swept, tmp_path):
  table, rows = swept
  (tmp_path / "t.csv").write_text(table.read_text())
  other = dataclasses.replace(CONFIG, batch=8, accumulate=2)
  (row,) = sweep(other, {"seed": [0]}, tmp_path / "t.csv", make_task=make_curve)
  assert row["config"] not in {row["config"] for row in rows}
  assert len(read_table(tmp_path / "t.csv")) == 33


def test_a_sweep_that_is_killed_keeps_the_rows_of_runs_that_had_ended(tmp_path, monkeypatch):
  real = Curve.evaluate
  calls = []

  def dying(self, *arguments):
    calls.append(0)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(Curve, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
      sweep(CONFIG, {"steps": [4, 5, 6]}, tmp_path / "t.csv", make_task=make_curve)
  assert [row["steps"] for row in read_table(tmp_path / "t.csv")] == [4, 5]


@pytest.mark.parametrize("together", [True, False])
def test_a_run_that_diverges_costs_its_own_row_only(tmp_path, together):
  class Cliff(Curve):
    def objective(self, params, model_state, batch, key):
      loss = super().objective(params, model_state, batch, key)["loss"]
      infinite = jnp.where(jnp.abs(params["w"]).max() > 50, jnp.inf, 0.0)
      return {"loss": Weighted(loss.num + infinite, loss.den)}

  grid = {"optimizer.learning_rate": [0.01, 1e3, 0.1]}
  make = lambda config: (config, Cliff(config))  # noqa: E731
  rows = sweep(CONFIG, grid, tmp_path / "t.csv", make_task=make, together=together)
  alone = sweep(
    CONFIG, {"optimizer.learning_rate": [0.01, 0.1]}, tmp_path / "u.csv", make_task=make
  )
  assert [row["status"] for row in rows] == ["finished", "diverged", "finished"]
  assert rows[1]["step"] == 2 and rows[1]["loss"] == math.inf and rows[1]["distance"] is None
  assert [rows[0]["loss"], rows[2]["loss"]] == pytest.approx([r["loss"] for r in alone], abs=1e-6)
  skipping = dataclasses.replace(CONFIG, nonfinite="skip")
  rows = sweep(skipping, grid, tmp_path / "v.csv", make_task=make, together=together)
  assert [row["status"] for row in rows] == ["finished"] * 3


REFUSED = [
  ({"optimizer.rate": [1.0]}, {}, r"optimizer\.rate=1\.0: there is no such field"),
  ({"model.D.x": [1]}, {}, r"model\.D\.x=1: there is no such field"),
  ({"batch": ["many"]}, {}, "batch='many': must be a whole number"),
  ({"seed": []}, {}, r"grid\['seed'\]=\[\]: must list at least one value"),
  ({"steps": [2]}, {}, r"optimizer\.warmup=2: must be below steps=2"),
  ({"seed": [0]}, {"mesh": MeshConfig(data=2)}, "mesh='data 2': a sweep runs on one device"),
  ({"seed": [0]}, {"spike": "skip"}, "spike='skip': a sweep does not act on spikes"),
]


@pytest.mark.parametrize("grid, changes, message", REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_sweep_cannot_do_is_refused_before_anything_runs(tmp_path, grid, changes, message):
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(UserError, match=message):
    sweep(config, {"seed": [0]} | grid, tmp_path / "t.csv", make_task=make_curve)
  assert not (tmp_path / "t.csv").exists()


@pytest.mark.slow
def test_32_learning_rates_of_micro_equal_32_single_runs_compile_once_and_read_the_text_once(
  tmp_path, monkeypatch, trace_once_per_shape
):
  for index in range(40):
    path = tmp_path / f"text/{index}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def f{index}(x):\n  return x + {index}\n" * 12)
  data = DataConfig(source=str(tmp_path / "text"), length=64)
  config = dataclasses.replace(
    presets.micro(), data=data, mesh=MeshConfig(data=1), steps=20, save_every=0, eval_every=0
  )
  reads = []
  real_read = sweep_module.load_text

  def reading(*arguments):
    reads.append(arguments)
    return real_read(*arguments)

  # above these rates the training amplifies rounding errors, in whatever order it adds
  rates = np.geomspace(1e-4, 1e-2, 32).tolist()
  grid = {"optimizer.learning_rate": rates}
  with monkeypatch.context() as patch:
    patch.setattr(sweep_module, "load_text", reading)
    made = trace_once_per_shape(1)
    rows = sweep(config, grid, tmp_path / "together.csv")
  assert len(reads) == len(made) == 1
  chex.clear_trace_counter()
  single = sweep(config, grid, tmp_path / "single.csv", together=False)
  assert len({row["loss"] for row in rows}) == 32
  np.testing.assert_allclose(
    [row["loss"] for row in rows], [row["loss"] for row in single], rtol=0, atol=1e-6
  )
  for index in (0, 20, 31):  # and so does the whole run, with its folder
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rates[index])
    run = str(tmp_path / f"run{index}")
    result = train(dataclasses.replace(config, optimizer=optimizer, run=run))
    assert rows[index]["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
    heldout = result.evaluation["heldout_loss"]
    assert rows[index]["heldout_loss"] == pytest.approx(heldout, abs=1e-6)
