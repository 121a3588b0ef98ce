"""Checkpoints: written by Orbax in the background, believed only with a manifest of digests beside them.

A run's `checkpoints/` holds one folder per saved step. Its items are `params`, `ema` (if any), `optimizer` (with step
and key) and `data` (the loader's position), each restored by itself and onto any mesh. The manifest is written last,
so a folder without one was never finished.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from jaxlm.checkpoint.folder import checkpoint_path, prune, remove, remove_leftovers, size_of
from jaxlm.checkpoint.manifest import write_manifest
from jaxlm.train.step import TrainState
from sharding.multihost import is_main, run_on_main_process

_log = logging.getLogger("jaxlm")
_ITEMS = ("params", "ema", "optimizer", "data")


class Checkpoints:
  """The checkpoints of one run: `save` returns at once, `wait` and `close` wait for what is being written.

  A context manager that closes, except on KeyboardInterrupt, which is to leave at once.
  A save that fails is logged, what it left is removed, and `saved` stays behind; the next one tries anew.
  """

  def __init__(self, folder: Path, *, keep: int, keep_every: int = 0, saved: int = -1):
    self.folder = folder.absolute()
    self.keep, self.keep_every = keep, keep_every
    self.saved = saved
    """step of the newest finished checkpoint; -1: none. On disk whatever becomes of this process"""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises
    self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*_ITEMS))
    self._finisher: threading.Thread | None = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
    if kind is not KeyboardInterrupt:
      self.close()

  def save(self, state: TrainState, data_state: dict) -> None:
    """Starts writing; waits only for the checkpoint before."""
    self.wait()
    step = int(state.step)
    if missing := run_on_main_process(lambda: self._missing_megabytes(state)):
      self._give_up(step, OSError(f"the disk lacks {missing:,} MB for it"))
      return
    items = {
      "params": ocp.args.StandardSave(state.params),
      "optimizer": ocp.args.StandardSave((state.step, state.opt_state, state.key)),
      "data": ocp.args.JsonSave(data_state),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    try:
      self._writer.save(checkpoint_path(self.folder, step), ocp.args.Composite(**items))
    except Exception as failure:  # a full disk has many faces here: OSError, ValueError, errors of jax and tensorstore
      self._give_up(step, failure)
      return
    self._finisher = threading.Thread(target=self._finish, args=(step,))
    self._finisher.start()

  def wait(self) -> int:
    """Until the newest checkpoint is written or given up; returns `saved`."""
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if is_main():
      remove_leftovers(
        self.folder
      )  # a failed save goes on writing for a while after it has said so
    return self.saved

  def close(self) -> int:
    self.wait()
    self._writer.close()
    return self.saved

  @property
  def newest(self) -> str:
    """`saved` in words."""
    return (
      f"the newest checkpoint is of step {self.saved}"
      if self.saved >= 0
      else "there is no checkpoint yet"
    )

  def _missing_megabytes(self, state: TrainState) -> int:
    """What the disk lacks for one more checkpoint: as large as the newest one, or else as the state in memory.

    Asked first because the writer, once it fails, buries its reason under pages of tracebacks.
    """
    if self.saved >= 0:
      need = size_of(checkpoint_path(self.folder, self.saved))
    else:
      need = sum(x.nbytes for x in jax.tree.leaves(state))
    disk = next(path for path in (self.folder, *self.folder.parents) if path.exists())
    return max(0, math.ceil((need - shutil.disk_usage(disk).free) / 1e6))

  def _finish(self, step: int) -> None:
    try:
      self._writer.wait_until_finished()
      if is_main():
        write_manifest(checkpoint_path(self.folder, step))
    except Exception as failure:
      self._give_up(step, failure)
      return
    self.saved = step
    if is_main():
      with _logged("old checkpoints stay"):
        prune(self.folder, self.keep, self.keep_every)

  def _give_up(self, step: int, failure: Exception) -> None:
    reason = (str(failure).splitlines() or [""])[0].partition(" [tensorstore_spec")[0] or type(
      failure
    ).__name__
    reason = reason if len(reason) < 300 else f"{reason[:100]} ... {reason[-150:]}"
    _log.error("step %d could not be saved, %s: %s", step, self.newest, reason)
    if is_main():
      with _logged("what was written of it stays"):
        remove(self.folder, step)


@contextlib.contextmanager
def _logged(consequence: str) -> Iterator[None]:
  """A file system that refuses costs a line of the log, not the run."""
  try:
    yield
  except OSError as error:
    _log.error("%s: %s", consequence, error)


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
  arguments: dict[str, Any] = {
    name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in items.items()
  }
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
