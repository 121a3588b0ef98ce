"""Checkpoints: written by Orbax in the background, believed only with a manifest of digests beside them.

A run's `checkpoints/` holds one folder per saved step. Its items are `params`, `ema` (if any), `optimizer` (with step
and key) and `data` (the loader's position), each restored by itself and onto any mesh. The manifest is written last,
so a folder without one was never finished.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from jaxlm.train.manifest import verify, write_manifest
from jaxlm.train.step import TrainState
from sharding.multihost import is_main

_log = logging.getLogger("jaxlm")
_ITEMS = ("params", "ema", "optimizer", "data")


class Checkpoints:
  """The checkpoints of one run: `save` returns at once, `close` waits for what is being written."""

  def __init__(self, folder: Path, *, keep: int, keep_every: int = 0):
    self.folder = folder.absolute()
    self.keep, self.keep_every = keep, keep_every
    self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*_ITEMS))
    self._finisher: threading.Thread | None = None
    self._failure: BaseException | None = None

  def save(self, state: TrainState, data_state: dict) -> None:
    """Starts writing; waits only for the checkpoint before. Raises what went wrong with that one."""
    self.wait()
    step = int(state.step)
    items = {
      "params": ocp.args.StandardSave(state.params),
      "optimizer": ocp.args.StandardSave((state.step, state.opt_state, state.key)),
      "data": ocp.args.JsonSave(data_state),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    self._writer.save(checkpoint_path(self.folder, step), ocp.args.Composite(**items))
    self._finisher = threading.Thread(target=self._finish, args=(step,))
    self._finisher.start()

  def wait(self) -> None:
    """Until the newest checkpoint is complete; raises what its writer raised."""
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def close(self) -> None:
    self.wait()
    self._writer.close()

  def _finish(self, step: int) -> None:
    try:
      self._writer.wait_until_finished()
      if is_main():
        write_manifest(checkpoint_path(self.folder, step))
        self._prune()
    except BaseException as failure:  # reported by the next wait() in the main thread
      self._failure = failure

  def _prune(self) -> None:
    for step in finished_steps(self.folder)[: -self.keep]:
      if not self.keep_every or step % self.keep_every:
        shutil.rmtree(checkpoint_path(self.folder, step))


def checkpoint_path(folder: Path, step: int) -> Path:
  return folder / f"{step:08d}"


def finished_steps(folder: Path) -> list[int]:
  """Steps whose checkpoint has a manifest, ascending."""
  return sorted(int(path.name) for path in _checkpoints(folder) if (path / "manifest.json").exists())


def newest_sound(folder: Path) -> int:
  """The step of the newest checkpoint that verifies; those that do not are passed over and logged.

  Raises FileNotFoundError when there is none.
  """
  for path in _checkpoints(folder):
    faults = verify(path)
    if not faults:
      return int(path.name)
    _log.warning("checkpoint %s does not verify: %s", path.name, "; ".join(faults))
  raise FileNotFoundError(f"{folder}: holds no checkpoint that verifies")


def set_aside_after(folder: Path, step: int) -> None:
  """Renames checkpoints of later steps, which a resumed run will write again: unfinished or damaged ones."""
  for path in _checkpoints(folder):
    if int(path.name) > step:
      aside = _free_name(path.with_name(f"{path.name}.unsound"))
      path.rename(aside)
      _log.warning("checkpoint %s moved to %s", path.name, aside.name)


def _checkpoints(folder: Path) -> list[Path]:
  """Newest first, finished or not."""
  return sorted((path for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def _free_name(path: Path) -> Path:
  names = (path.with_name(f"{path.name}{count or ''}") for count in range(10**6))
  return next(name for name in names if not name.exists())


def restore(path: Path, like: TrainState) -> tuple[TrainState, dict]:
  """(state, loader position) from a checkpoint folder; `like` gives shapes, dtypes and shardings."""
  items = {
    "params": like.params,
    "optimizer": (like.step, like.opt_state, like.key),
    **({} if like.ema is None else {"ema": like.ema}),
  }
  loaded = _load(path, items, ("data",))
  step, opt_state, key = loaded["optimizer"]
  return TrainState(step, loaded["params"], opt_state, loaded.get("ema"), key), loaded["data"]


def restore_params(path: Path, like: Any) -> Any:
  """The weights alone: the moving average where the checkpoint has one."""
  item = "ema" if (path / "ema").exists() else "params"
  return _load(path, {item: like}, ())[item]


def _load(path: Path, items: dict[str, Any], json_items: Iterable[str]) -> Any:
  arguments: dict[str, Any] = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in items.items()}
  arguments |= {name: ocp.args.JsonRestore() for name in json_items}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*_ITEMS)) as reader:
    return reader.restore(path.absolute(), ocp.args.Composite(**arguments))


def _abstract(tree: Any) -> Any:
  """Shapes with shardings on the current mesh's devices."""
  mesh = jax.sharding.get_mesh()

  def leaf(x: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, jax.typeof(x).sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)
