import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm.checkpoint.checkpoint import Checkpoints, restore, restore_weights
from jaxlm.checkpoint.folder import (
  checkpoint_path,
  finished_steps,
  newest_sound,
  prune,
  set_aside_after,
)
from jaxlm.checkpoint.manifest import write_manifest
from jaxlm.train import Hyper, TrainState
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    yield


def state_at(step: int, ema: bool = False) -> TrainState:
  weights = {"w": np.full((4, 3), step, np.float32)}
  average = {"w": np.full((4, 3), -step, np.float32)} if ema else None
  hyper = Hyper(jnp.float32(0.1), jnp.float32(0), jnp.int32(9))

  def make() -> TrainState:
    return TrainState(
      step=jnp.int32(step),
      params=weights,
      frozen={"table": jnp.full(2, step)},
      model_state={"count": jnp.int32(step)},
      opt_state=(jnp.float32(0.5),),
      ema=average,
      key=jax.random.key(step),
      hyper=hyper,
    )

  return jax.jit(make)()


def save(folder, steps, *, ema=False, **options) -> None:
  checkpoints = Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(state_at(step, ema), {"next_index": 10 * step})
  checkpoints.close()


def test_the_newest_are_kept_and_every_kth_besides(tmp_path):
  save(tmp_path, range(1, 8), keep=2, keep_every=3)
  assert finished_steps(tmp_path) == [3, 6, 7]


def test_without_keep_every_only_the_newest_are_kept(tmp_path):
  save(tmp_path, range(1, 5), keep=1)
  assert finished_steps(tmp_path) == [4]


def test_everything_comes_back(tmp_path):
  save(tmp_path, [3], keep=1, ema=True)
  state, position = restore(
    checkpoint_path(tmp_path, 3), jax.eval_shape(lambda: state_at(0, ema=True))
  )
  assert int(state.step) == 3 and position == {"next_index": 30}
  np.testing.assert_array_equal(state.params["w"], 3)
  np.testing.assert_array_equal(state.ema["w"], -3)
  assert float(state.opt_state[0]) == 0.5 and int(state.model_state["count"]) == 3
  np.testing.assert_array_equal(state.frozen["table"], 3)
  assert float(state.hyper.learning_rate) == np.float32(0.1) and int(state.hyper.steps) == 9
  assert jax.random.key_data(state.key).tolist() == jax.random.key_data(jax.random.key(3)).tolist()


@pytest.mark.parametrize("ema, want", [(True, -3), (False, 3)])
def test_weights_for_use_are_the_moving_average_where_there_is_one(tmp_path, ema, want):
  save(tmp_path, [3], keep=1, ema=ema)
  like = jax.eval_shape(lambda: state_at(0))
  weights = restore_weights(checkpoint_path(tmp_path, 3), like)
  np.testing.assert_array_equal(weights["w"], want)
  np.testing.assert_array_equal(weights["table"], 3)  # the frozen ones belong to them


def test_a_checkpoint_of_the_old_format_is_refused_by_name(tmp_path):
  """It had step and key inside an item `optimizer`; a manifest makes it look sound."""
  old = checkpoint_path(tmp_path, 7)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "optimizer", "data")) as writer:
    state = state_at(7)
    items = {
      "params": ocp.args.StandardSave(state.params),
      "optimizer": ocp.args.StandardSave((state.step, state.opt_state, state.key)),
      "data": ocp.args.JsonSave({"next_index": 70}),
    }
    writer.save(old, ocp.args.Composite(**items))
  write_manifest(old)
  message = "00000007: is of the old checkpoint format"
  with pytest.raises(UserError, match=message):
    newest_sound(tmp_path)
  like = jax.eval_shape(lambda: state_at(0))
  for load in (restore, restore_weights):
    with pytest.raises(UserError, match=message):
      load(old, like)
  assert {path.name for path in tmp_path.iterdir()} == {"00000007"}  # nothing moved


def test_unsound_checkpoints_are_passed_over_and_set_aside_only_by_a_resumed_run(tmp_path):
  save(tmp_path, [1, 2, 3], keep=3)
  (checkpoint_path(tmp_path, 3) / "manifest.json").unlink()
  array = max(
    checkpoint_path(tmp_path, 2).rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
  )
  array.write_bytes(bytes([array.read_bytes()[0] ^ 64]) + array.read_bytes()[1:])
  assert newest_sound(tmp_path) == 1
  assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000002", "00000003"}
  set_aside_after(tmp_path, 1)
  assert {path.name for path in tmp_path.iterdir()} == {
    "00000001",
    "00000002.unsound",
    "00000003.unsound",
  }
  save(tmp_path, [2], keep=3)
  (checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
  set_aside_after(tmp_path, 1)
  assert (tmp_path / "00000002.unsound1").is_dir()  # an earlier one is not overwritten


def test_what_was_set_aside_is_never_pruned_and_what_a_killed_process_left_is_cleared_away(
  tmp_path,
):
  save(tmp_path, [1, 2], keep=2)
  (checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
  set_aside_after(tmp_path, 1)
  for name in ("00000002.orbax-checkpoint-tmp", "00000000.deleting"):
    (tmp_path / name / "params").mkdir(parents=True)
  save(tmp_path, range(2, 5), keep=1)
  assert {path.name for path in tmp_path.iterdir()} == {"00000002.unsound", "00000004"}


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
  save(tmp_path, [1, 2], keep=2)
  with monkeypatch.context() as patch:
    patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
      prune(tmp_path, keep=1, keep_every=0)
  assert finished_steps(tmp_path) == [2] and (tmp_path / "00000001.deleting/manifest.json").exists()


@pytest.mark.parametrize("failure, want", [(FloatingPointError, [1]), (KeyboardInterrupt, [])])
def test_a_failing_run_finishes_what_it_was_writing_unless_it_is_to_leave_at_once(
  tmp_path, failure, want, monkeypatch
):
  release = threading.Event()

  def slowly(folder):
    release.wait(0.5)
    write_manifest(folder)

  monkeypatch.setattr("jaxlm.checkpoint.checkpoint.write_manifest", slowly)
  checkpoints = Checkpoints(tmp_path, keep=1)
  with pytest.raises(failure):
    with checkpoints:
      checkpoints.save(state_at(1), {})
      raise failure
  assert finished_steps(tmp_path) == want
  release.set()
  checkpoints.close()


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch, caplog):
  full = types.SimpleNamespace(free=0)
  checkpoints = Checkpoints(tmp_path, keep=1)
  with monkeypatch.context() as patch:
    patch.setattr("shutil.disk_usage", lambda _: full)
    checkpoints.save(state_at(1), {})
  assert (
    "step 1 could not be saved, there is no checkpoint yet: the disk lacks 1 MB for it"
    in caplog.text
  )
  assert list(tmp_path.iterdir()) == []
  checkpoints.save(state_at(2), {})
  assert checkpoints.close() == 2


def test_a_failed_save_is_logged_cleared_away_and_tried_anew_by_the_next(
  tmp_path, monkeypatch, caplog
):
  def full_disk(folder):
    raise OSError("disk full")

  save(tmp_path, [1], keep=9)
  checkpoints = Checkpoints(tmp_path, keep=9, saved=1)
  with monkeypatch.context() as patch:
    patch.setattr("jaxlm.checkpoint.checkpoint.write_manifest", full_disk)
    checkpoints.save(state_at(2), {})
    assert checkpoints.wait() == 1
    assert "step 2 could not be saved, the newest checkpoint is of step 1: disk full" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
  checkpoints.save(state_at(2), {})  # as at the end of a run, where the last step is tried twice
  assert checkpoints.close() == 2
  assert finished_steps(tmp_path) == [1, 2] and newest_sound(tmp_path) == 2


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  for folder in (tmp_path, tmp_path / "missing"):
    assert finished_steps(folder) == []
    with pytest.raises(FileNotFoundError, match="no checkpoint that verifies"):
      newest_sound(folder)
