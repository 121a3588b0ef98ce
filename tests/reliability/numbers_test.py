"""Steps that are not finite stop a run or are skipped, and a replay names the module."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.reliability.processes import run, write_corpus
from jaxlm import presets
from jaxlm.checkpoint.folder import all_steps, finished_steps
from jaxlm.checkpoint.manifest import verify
from jaxlm.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, decoder
from jaxlm.data.loader import load_text, train_loader
from jaxlm.data.packing import Batch
from jaxlm.models import embedding
from jaxlm.objectives import Weighted
from jaxlm.run import guard as guards
from jaxlm.run import resume, train
from jaxlm.run.guard import Guard, load_batch
from jaxlm.run.replay import diagnose, replay
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

BELL = 7  # a byte that stands in few documents; what the model makes of it is tampered with
TAMPERED = """
import jax.numpy as jnp
import jaxlm.models.embedding as embedding
whole = embedding.lookup
def lookup(w_VD, ids_BT, *dtypes):
  return jnp.where((ids_BT == 7)[..., None], jnp.nan, whole(w_VD, ids_BT, *dtypes))
embedding.lookup = lookup
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
  folder = write_corpus(tmp_path_factory.mktemp("bells") / "text")
  for index in range(6):
    (folder / f"bell{index}.py").write_text("\a" * 20)
  return TrainConfig(
    steps=8,
    batch=8,
    save_every=2,
    eval_every=0,
    eval_batches=1,
    keep=9,
    nonfinite="skip",
    mesh=MeshConfig(data=1),
    model=decoder(D=16, F=24, N=2, K=1, H=8, layers=2),
    data=DataConfig(source=str(folder), length=32, holdout=0.1),
    optimizer=OptimizerConfig(warmup=2, learning_rate=1e-2),
  )


def records(folder: RunFolder) -> list[dict]:
  return list(read_records(folder.metrics))


def steps_with_bells(config: TrainConfig, steps: int) -> list[int]:
  """Returns the steps, counted from 1, whose batches have a bell."""
  batches = train_loader(load_text(config.data), batch=config.batch, seed=config.seed)
  return [step for step in range(1, steps + 1) if (next(batches).inputs_BT == BELL).any()]


@pytest.fixture
def nan_at_bells(monkeypatch) -> None:
  """The embedding of a bell is not a number."""
  whole = embedding.lookup

  def bell(w_VD, ids_BT, *dtypes):
    return jnp.where((ids_BT == BELL)[..., None], jnp.nan, whole(w_VD, ids_BT, *dtypes))

  monkeypatch.setattr(embedding, "lookup", bell)


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run_and_leaves_what_a_replay_needs(
  config, tmp_path, nan_at_bells, capsys
):
  folder = RunFolder(tmp_path / "run")
  with pytest.raises(FloatingPointError) as error:
    train(dataclasses.replace(config, steps=40, nonfinite="stop", run=str(folder.path)))
  bad = records(folder)[-1]
  assert math.isnan(bad["loss"]) and bad["skipped"] == 1
  step = bad["step"]
  assert f"step {step}: loss nan, gradient norm nan" in str(error.value)
  assert f"jaxlm replay {folder.path} --step {step}" in str(error.value)
  batch = Batch(**load_batch(folder.bad_steps, step))
  assert (batch.inputs_BT == BELL).any()
  chex.assert_shape(batch[:3], (8, 32))
  assert json.loads((folder.bad_steps / f"{step:08d}/step.json").read_text())["step"] == step
  # what was being written is finished, and nothing came after it
  saved = all_steps(folder.checkpoints)
  assert saved == finished_steps(folder.checkpoints) == list(range(2, step, 2))
  assert all(not verify(folder.checkpoints / f"{at:08d}") for at in saved)

  before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
  replay(folder.path, step)
  said = capsys.readouterr().out
  assert f"step {step}: loss nan" in said
  assert "the first module whose output is not finite is the embedding" in said
  assert "differ from" not in said and "the saved one is used" not in said
  after = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
  assert after == before  # it wrote nothing


@pytest.mark.slow
def test_skipping_leaves_out_exactly_those_updates_and_a_resumed_run_repeats_it(
  config, tmp_path, nan_at_bells
):
  whole, halved = (RunFolder(tmp_path / name) for name in ("whole", "halved"))
  result = train(dataclasses.replace(config, steps=12, run=str(whole.path)))
  assert result.finished and all(
    np.isfinite(w).all() for w in jax.tree.leaves(jax.device_get(result.params))
  )
  bad = steps_with_bells(config, 12)
  assert 1 < len(bad) < 12  # the text has both kinds of batches
  assert [record["step"] for record in records(whole) if record["skipped"]] == bad
  assert [record["step"] for record in records(whole) if math.isnan(record["loss"])] == bad
  assert f"{len(bad)} so far" in whole.log.read_text()
  train(dataclasses.replace(config, steps=12, run=str(halved.path)))
  for step in (8, 10, 12):
    (halved.checkpoints / f"{step:08d}/manifest.json").unlink()
  resume(halved.path)

  def without(folder):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records(folder)]

  np.testing.assert_equal(without(halved), without(whole))


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_and_moments_and_counts(config):
  """Bit for bit, while counters count on."""
  config = dataclasses.replace(config, ema=0.5)
  step = jax.jit(make_train_step(config, TextTask(config)))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config))
  ids_BT = np.zeros((8, 32), np.int32)
  batch = Batch(ids_BT, ids_BT, np.ones((8, 32), np.float32))
  same, metrics = step(state, batch, -1.0)  # no loss is below this
  assert metrics["skipped"] == 1 and same.step == 1 and np.isfinite(metrics["loss"])
  chex.assert_trees_all_equal((same.params, same.ema), (state.params, state.ema))
  counted = jax.tree.map(lambda x: x + (x.dtype == jnp.int32), state.opt_state)
  chex.assert_trees_all_equal(same.opt_state, counted)
  moved, metrics = step(state, batch, 100.0)
  assert metrics["skipped"] == 0
  assert (moved.params["embed"]["weight"] != state.params["embed"]["weight"]).any()


LATE = dict(steps=36, save_every=0, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_spike_is_said_and_acted_on_only_when_told_to(config, tmp_path, monkeypatch, action):
  whole = TextTask.objective

  def jumping(task, params, model_state, batch, key):
    loss = whole(task, params, model_state, batch, key)["loss"]
    jump = jnp.where((batch.inputs_BT == BELL).any(), 9.0, 0.0)
    return {"loss": Weighted(loss.num + jump * loss.den, loss.den)}

  monkeypatch.setattr(TextTask, "objective", jumping)
  monkeypatch.setattr(guards, "FEWEST", 3)
  folder = RunFolder(tmp_path / "run")
  config = dataclasses.replace(config, **LATE, spike=action, spike_size=8.0, run=str(folder.path))
  seeds = (dataclasses.replace(config, seed=seed) for seed in range(100))
  first = lambda config: min(steps_with_bells(config, LATE["steps"]), default=0)  # noqa: E731
  config = next(c for c in seeds if 8 < first(c) < 30)
  try:
    train(config)
    stopped = False
  except FloatingPointError as error:
    stopped = True
    assert "the losses before allow" in str(error)
  bell = first(config)
  record = records(folder)[bell - 1]
  assert record["spike"] == 1 and record["skipped"] == (action == "skip")
  assert stopped == (action == "stop") and (len(records(folder)) == bell) == stopped
  assert f"step {bell}: loss {record['loss']}" in folder.log.read_text()
  assert (load_batch(folder.bad_steps, bell) is not None) == stopped


def judged(losses) -> list[int]:
  """Returns the steps that a guard calls spikes."""
  guard, found = Guard(presets.micro(), RunFolder(Path("nowhere")), 0), []
  batch = Batch(*[np.zeros((1, 1))] * 3)
  for step, loss in enumerate(losses, start=1):
    if guard.is_spike(step, loss):
      found.append(step)
    guard.check_step(step, {"loss": loss, "grad_norm": 1.0, "skipped": 0.0}, batch, np.arange(1))
  return found


def test_spikes_are_told_from_noise_and_from_a_falling_loss():
  """Finds none in 8,000 steps of a falling loss with noise, and all 12 jumps by 12 deviations."""
  draw = np.random.default_rng(0)
  steps = np.arange(8_000)
  losses = 2 + 4 * np.exp(-steps / 500) + 0.05 * draw.standard_normal(len(steps))
  assert judged(losses) == []
  jumps = list(range(2_000, 8_000, 500))
  losses[jumps] += 12 * 0.05
  assert judged(losses) == [step + 1 for step in jumps]


def test_a_level_that_stays_is_a_spike_only_until_it_is_the_usual():
  found = judged([2.0] * 100 + [4.0] * 100)
  assert found == list(range(101, 101 + len(found))) and 30 <= len(found) <= 40


def test_the_border_of_a_step_does_not_depend_on_when_the_run_was_resumed(tmp_path):
  folder = RunFolder(tmp_path)
  losses = np.random.default_rng(1).normal(2, 0.1, 90).tolist()
  lines = (
    json.dumps({"step": step, "loss": loss, "skipped": 0})
    for step, loss in enumerate(losses, start=1)
  )
  folder.metrics.write_text("\n".join(lines))
  config = dataclasses.replace(presets.micro(), spike="skip")
  whole = Guard(config, RunFolder(tmp_path / "none"), 0)
  for step, loss in enumerate(losses, start=1):
    whole.losses[step] = loss
  resumed = Guard(config, folder, 85)
  for step, loss in enumerate(losses[85:], start=86):
    resumed.losses[step] = loss
  for step in (88, 91, 92):
    assert resumed.limit(step) == whole.limit(step) < math.inf
  early = Guard(config, folder, 90)
  middle = statistics.median(losses[24:88])
  deviation = statistics.median(abs(loss - middle) for loss in losses[24:88])
  assert early.limit(90) == middle + 10 * deviation


@pytest.mark.parametrize(
  "path, name",
  [
    (("embed", "weight"), "the embedding"),
    (("stacks", "0", "0", "mixer", "v", "weight"), "block 1: mixer.v"),
    (("stacks", "0", "0", "feedforward", "up", "weight"), "block 1: feedforward.up"),
    (("stacks", "0", "0", "feedforward_norm", "weight"), "block 1: feedforward_norm"),
    (("norm", "weight"), "norm"),
    (("head", "weight"), "the head"),
  ],
  ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)
def test_the_module_named_is_the_one_that_was_broken(config, path, name):
  """One weight of the last layer, or of what has no layers, is infinite."""
  ids_BT = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    params = jax.tree.map(np.array, init_state(config, TextTask(config)).params)
    leaf = params
    for key in path:
      leaf = leaf[key]
    leaf[
      (-1, *[0] * (leaf.ndim - 1))
      if path[0] == "stacks"
      else ids_BT[0, 0]
      if path[0] == "embed"
      else 0
    ] = np.inf
    lines = diagnose(config, params, Batch(ids_BT, ids_BT, np.ones((8, 32), np.float32)))
  assert f"weights that are not finite: {'/'.join(path)}" in lines[0]
  assert lines[-1] == f"the first module whose output is not finite is {name}"


@pytest.mark.slow
def test_as_a_user_sees_it(tmp_path):
  write_corpus(tmp_path / "text")
  (tmp_path / "text/bell.py").write_text("\a" * 40)
  flags = (
    "--steps 60 --data.source text --data.length 32 --batch 8 --mesh.data 1 --eval_every 0".split()
  )
  status, said = run(tmp_path, "train", "micro", "--run", "stop", *flags, setup=TAMPERED)
  assert status == 1 and "Traceback" not in said, said
  step = records(RunFolder(tmp_path / "stop"))[-1]["step"]
  assert f"jaxlm: step {step}: loss nan" in said and f"jaxlm replay stop --step {step}" in said
  status, said = run(tmp_path, "replay", "stop", "--step", str(step), setup=TAMPERED)
  assert status == 0 and "the first module whose output is not finite is the embedding" in said, (
    said
  )
