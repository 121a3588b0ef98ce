"""Writes checkpoints by Orbax in the background; reads those that have a manifest beside them.

A run's `checkpoints/` holds one folder per saved step. Its items are the fields of `TrainState`
that hold arrays (`params`, `frozen`, `model_state`, `opt_state`, `ema`, `key`, `step`, `hyper`) and
`data`, the position in the data; each is restored by itself and onto any mesh. The manifest is
written last, so a folder without one was never finished.
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

from jaxlm.checkpoint.folder import (
  checkpoint_path,
  prune,
  refuse_old_format,
  remove,
  remove_leftovers,
  size_of,
)
from jaxlm.checkpoint.manifest import write_manifest
from jaxlm.checkpoint.read_back import Shapes, check_readable, names_of, shapes_of
from jaxlm.config import check
from jaxlm.paths import literal_path
from jaxlm.train.state import TrainState, merge
from sharding.failure import Attempt
from sharding.multihost import is_main, run_on_main_process

_log = logging.getLogger("jaxlm")
_ITEMS = (*TrainState._fields, "data")


class Checkpoints:
  """Saves the checkpoints of one run in the background; `wait` and `close` wait for the writing.

  A context manager that closes, except on KeyboardInterrupt, which is to leave at once, and where a
  collective has failed, because what is being written may wait for a process that is gone. A save
  that fails is logged, what it left is removed, and `saved` stays behind; the next one tries anew.
  """

  def __init__(self, folder: Path, *, keep: int, keep_every: int = 0, saved: int = -1):
    self.folder = folder.absolute()
    self._literal_folder = literal_path(folder)
    self.keep, self.keep_every = keep, keep_every
    self.saved = saved
    """Step of the newest checkpoint that is complete on disk, or -1."""
    self._absl_level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises
    self._writer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(*_ITEMS),
      async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_for_all),
    )
    self._finisher: threading.Thread | None = None
    self._attempt = Attempt()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
    lost = kind is jax.errors.JaxRuntimeError and jax.process_count() > 1
    if kind is not KeyboardInterrupt and not lost:
      self.close()

  def save(self, state: TrainState, data_state: dict) -> None:
    """Starts writing; waits only for the checkpoint before."""
    self.wait()
    self._attempt = Attempt()
    step = int(state.step)
    if missing := run_on_main_process(lambda: self._missing_megabytes(state)):
      self._give_up(step, OSError(f"the disk lacks {missing:,} MB for it"))
      return
    arrays = _filled(state)
    items: dict[str, Any] = {
      name: ocp.args.StandardSave(_wrap(tree)) for name, tree in arrays.items()
    }
    items["data"] = ocp.args.JsonSave(data_state)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)  # what a link leads to has to be there
      self._writer.save(checkpoint_path(self._literal_folder, step), ocp.args.Composite(**items))
    except Exception as failure:  # a full disk has many faces here: also errors of tensorstore
      self._give_up(step, failure)
      return
    self._finisher = threading.Thread(target=self._finish, args=(step, shapes_of(arrays)))
    self._finisher.start()

  def wait(self) -> int:
    """Waits until the newest checkpoint is written or given up; returns `saved`."""
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if is_main():
      # a failed save goes on writing for a while after it has said so
      remove_leftovers(self.folder)
    return self.saved

  def close(self) -> int:
    """Waits as `wait` does and stops the writer; returns `saved`."""
    self.wait()
    self._writer.close()
    logging.getLogger("absl").setLevel(self._absl_level)
    return self.saved

  @property
  def newest(self) -> str:
    """Says in words which checkpoint is the newest."""
    if self.saved < 0:
      return "there is no checkpoint yet"
    return f"the newest checkpoint is of step {self.saved}"

  def _missing_megabytes(self, state: TrainState) -> int:
    """Returns the megabytes that the disk lacks for one more checkpoint, 0 where there is room.

    It needs as much as the newest one, or else as the state in memory. Asked first because the
    writer, once it fails, buries its reason under pages of tracebacks.
    """
    if self.saved >= 0:
      need = size_of(checkpoint_path(self.folder, self.saved))
    else:
      need = sum(x.nbytes for x in jax.tree.leaves(state))
    disk = next(path for path in (self.folder, *self.folder.parents) if path.exists())
    return max(0, math.ceil((need - shutil.disk_usage(disk).free) / 1e6))

  def _wait_for_all(self, *, key: str, timeout_ms: int) -> None:
    self._attempt.wait_for_all(key, timeout_ms)

  def _finish(self, step: int, written: Shapes) -> None:
    try:
      self._writer.wait_until_finished()
      if is_main():
        check_readable(checkpoint_path(self._literal_folder, step), written)
        write_manifest(checkpoint_path(self.folder, step))
    except Exception as failure:
      self._give_up(step, failure)
      return
    self.saved = step
    if is_main():
      with _logged("old checkpoints stay"):
        prune(self.folder, self.keep, self.keep_every)

  def _give_up(self, step: int, failure: Exception) -> None:
    first_line = (str(failure).splitlines() or [""])[0]
    reason = first_line.partition(" [tensorstore_spec")[0] or type(failure).__name__
    reason = reason if len(reason) < 300 else f"{reason[:100]} ... {reason[-150:]}"
    self._attempt.give_up(reason)
    _log.error("step %d could not be saved, %s: %s", step, self.newest, reason)
    if is_main():
      with _logged("what was written of it stays"):
        remove(self.folder, step)


@contextlib.contextmanager
def _logged(consequence: str) -> Iterator[None]:
  """Logs an OSError in place of raising it: a refusing file system must not cost the run."""
  try:
    yield
  except OSError as error:
    _log.error("%s: %s", consequence, error)


def restore(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """Returns (state, position in the data) of a checkpoint folder.

  `like` gives shapes, dtypes and shardings. Raises UserError for a checkpoint of the old format.
  """
  loaded = _load(path, _filled(like), ("data",))
  position = loaded.pop("data")
  return like._replace(**loaded), position


def restore_weights(path: Path, like: TrainState) -> Any:
  """Returns the weights for use alone: the average, if there is one, with the frozen ones.

  Raises UserError for parameters that the checkpoint does not have.
  """
  trained = "ema" if (path / "ema").exists() else "params"
  leaves = jax.tree_util.tree_leaves_with_path(like.params)
  wanted = {jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in leaves}
  missing = sorted(wanted - names_of(path / trained))
  rule = f"lacks {', '.join(missing[:4])}, which config.json asks for; resume the run to add them"
  check(not missing, "checkpoint", str(path), rule)
  items = {trained: like.params}
  if jax.tree.leaves(like.frozen):
    items["frozen"] = like.frozen
  loaded = _load(path, items, ())
  return merge(loaded[trained], loaded.get("frozen", {}))


def _filled(state: TrainState) -> dict[str, Any]:
  """Returns the fields that hold arrays, by name."""
  return {name: tree for name, tree in state._asdict().items() if jax.tree.leaves(tree)}


def _wrap(tree: Any) -> Any:
  """Returns what Orbax takes for a tree: a single array in a dict, anything else as it is."""
  return {"value": tree} if jax.tree_util.all_leaves([tree]) else tree


def _load(path: Path, items: dict[str, Any], json_items: Iterable[str]) -> dict[str, Any]:
  refuse_old_format(path)
  arguments: dict[str, Any] = {
    name: ocp.args.StandardRestore(_wrap(_abstract(tree))) for name, tree in items.items()
  }
  arguments |= {name: ocp.args.JsonRestore() for name in json_items}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*_ITEMS)) as reader:
    loaded = reader.restore(literal_path(path.parent) / path.name, ocp.args.Composite(**arguments))
  return {
    name: loaded[name]["value"] if jax.tree_util.all_leaves([items.get(name, {})]) else loaded[name]
    for name in arguments
  }


def _abstract(tree: Any) -> Any:
  """Returns shapes and dtypes with shardings on the current mesh's devices."""
  mesh = jax.sharding.get_mesh()

  def leaf(x: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, jax.typeof(x).sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)
