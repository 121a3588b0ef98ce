import fcntl
import functools
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxlm.checkpoint.folder as folder_module
from jaxlm.checkpoint.checkpoint import Checkpoints, restore, restore_weights
from jaxlm.checkpoint.folder import (
  all_steps,
  checkpoint_path,
  finished_steps,
  hold_newest_sound,
  newest_sound,
  prune,
  remove,
  set_aside_after,
)
from jaxlm.checkpoint.manifest import verify, write_manifest
from jaxlm.checkpoint.read_back import shapes_of
from jaxlm.train import Hyper, TrainState
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    yield


@functools.partial(jax.jit, static_argnames="ema")
def state_at(step: int, ema: bool = False) -> TrainState:
  weights = {"w": jnp.full((4, 3), step, jnp.float32)}
  average = {"w": jnp.full((4, 3), -step, jnp.float32)} if ema else None
  return TrainState(
    step=jnp.int32(step),
    params=weights,
    frozen={"table": jnp.full(2, step)},
    model_state={"count": jnp.int32(step)},
    opt_state=(jnp.float32(0.5),),
    ema=average,
    key=jax.random.key(step),
    hyper=Hyper(jnp.float32(0.1), jnp.float32(0), jnp.int32(9)),
  )


def save(folder, steps, *, ema=False, **options) -> None:
  checkpoints = Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(state_at(step, ema), {"next_index": 10 * step})
  checkpoints.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A checkpoint; folders are put together of its copies where only folders matter."""
  folder = tmp_path_factory.mktemp("sound")
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    save(folder, [1], keep=1)
  return checkpoint_path(folder, 1)


def copies(sound, folder, steps) -> None:
  for step in steps:
    shutil.copytree(sound, checkpoint_path(folder, step))


@pytest.mark.parametrize("keep_every, want", [(3, [3, 6, 7]), (0, [6, 7])])
def test_the_newest_are_kept_and_every_kth_besides(tmp_path, sound, keep_every, want):
  copies(sound, tmp_path, range(1, 7))
  save(tmp_path, [7], keep=2, keep_every=keep_every)
  assert finished_steps(tmp_path) == want


def test_each_save_prunes(tmp_path):
  save(tmp_path, [1, 2], keep=1)
  assert finished_steps(tmp_path) == [2]


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


def test_unsound_checkpoints_are_passed_over_and_set_aside_only_by_a_resumed_run(tmp_path, sound):
  copies(sound, tmp_path, [1, 2, 3])
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
  copies(sound, tmp_path, [2])
  (checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
  set_aside_after(tmp_path, 1)
  assert (tmp_path / "00000002.unsound1").is_dir()  # an earlier one is not overwritten


def test_what_was_set_aside_is_never_pruned_and_what_a_killed_process_left_is_cleared_away(
  tmp_path, sound
):
  copies(sound, tmp_path, [1, 2])
  (checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
  set_aside_after(tmp_path, 1)
  for name in ("00000002.orbax-checkpoint-tmp", "00000000.deleting"):
    (tmp_path / name / "params").mkdir(parents=True)
  save(tmp_path, [2, 3], keep=1)
  assert {path.name for path in tmp_path.iterdir()} == {"00000002.unsound", "00000003"}


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path, sound, monkeypatch):
  copies(sound, tmp_path, [1, 2])
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
  tmp_path, sound, monkeypatch, caplog
):
  def full_disk(folder):
    raise OSError("disk full")

  copies(sound, tmp_path, [1])
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


HARD_NAMES = (
  "lr=[3e-3]/[!a]/[]",
  "a*b",
  "what?",
  "back\\slash/\\",
  "gs:",
  "\udcff",
  "{a,b}/100%5B/new\nline/ space /ünïcødé日本",
  "x" * 255,
)


@pytest.mark.parametrize("name", HARD_NAMES, ids=ascii)
def test_a_checkpoint_is_read_back_whatever_the_folders_above_it_are_called(tmp_path, sound, name):
  """Orbax takes * ? [ for patterns, tensorstore a backslash for a border and gs: for an address."""
  folder = tmp_path / name / "run"
  copies(sound, tmp_path / "aXb/run", [7])  # which a*b matches
  save(folder, [3], keep=1)
  state, position = restore(checkpoint_path(folder, 3), jax.eval_shape(lambda: state_at(0)))
  np.testing.assert_array_equal(state.params["w"], 3)
  assert position == {"next_index": 30} and newest_sound(folder) == 3
  assert {path.name for path in tmp_path.iterdir()} == {"aXb", name.split("/")[0]}


def test_a_checkpoint_that_cannot_be_read_gets_no_manifest(tmp_path, monkeypatch, caplog):
  """As where Orbax, which looks for a pattern, does not find what it has to put together."""
  monkeypatch.setattr("jaxlm.checkpoint.checkpoint.literal_path", lambda path: path)
  save(tmp_path / "[3e-3]", [1], keep=1)
  assert "step 1 could not be saved, there is no checkpoint yet: NOT_FOUND" in caplog.text
  assert list((tmp_path / "[3e-3]").iterdir()) == []


def test_a_checkpoint_of_other_arrays_than_were_given_gets_no_manifest(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(
    "jaxlm.checkpoint.checkpoint.shapes_of",
    lambda items: shapes_of(items) | {"params": [((4, 2), "float32")]},
  )
  save(tmp_path, [1], keep=1)
  assert "params reads back with other arrays than were written" in caplog.text
  assert finished_steps(tmp_path) == []


def test_what_others_drop_into_the_folder_is_ignored_and_left_alone(tmp_path, sound):
  copies(sound, tmp_path, [1])
  dropped = ("123", "\u00b2", "00000001 copy/x", "00000002", "my.deleting.list/x", ".DS_Store")
  inside = (".DS_Store", "notes.txt", "backup/x", "params/._d", "params/ocdbt.process_0/notes")
  names = [*dropped, *(f"00000001/{name}" for name in inside)]
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("not of the checkpoint")
  assert all_steps(tmp_path) == [1] and newest_sound(tmp_path) == 1
  state, _ = restore(checkpoint_path(tmp_path, 1), jax.eval_shape(lambda: state_at(0)))
  np.testing.assert_array_equal(state.params["w"], 1)
  save(tmp_path, [3], keep=2)
  set_aside_after(tmp_path, 3)
  assert all_steps(tmp_path) == [1, 3] and all((tmp_path / name).exists() for name in names)


def test_a_checkpoint_that_is_read_is_pruned_only_when_it_is_free(tmp_path, sound):
  copies(sound, tmp_path, [1, 2])
  with hold_newest_sound(tmp_path) as held:
    assert held == 2
    copies(sound, tmp_path, [3])
    save(tmp_path, [4], keep=1)
    assert finished_steps(tmp_path) == [2, 4] and verify(checkpoint_path(tmp_path, 2)) == []
  prune(tmp_path, keep=1, keep_every=0)
  assert finished_steps(tmp_path) == [4]


@pytest.mark.parametrize("moment", ["listed", "opened"])
def test_a_checkpoint_that_goes_while_a_reader_looks_is_not_the_one_it_gets(
  tmp_path, sound, monkeypatch, moment, caplog
):
  """A writer that keeps one checkpoint puts step 2 in the place of step 1."""
  copies(sound, tmp_path, [1])
  name = {"listed": "jaxlm.checkpoint.folder.held", "opened": "fcntl.flock"}[moment]
  original = {"listed": folder_module.held, "opened": fcntl.flock}[moment]

  def meanwhile(*arguments):
    monkeypatch.undo()
    remove(tmp_path, 1)
    copies(sound, tmp_path, [2])
    return original(*arguments)

  monkeypatch.setattr(name, meanwhile)
  with hold_newest_sound(tmp_path) as step:
    assert step == 2
  assert not caplog.records
