"""Restores the state of a run from a checkpoint, or makes its first one.

Scales that rules learn and that a checkpoint lacks, because the rules were added since, start from
the restored weights and the next batch; everything else goes on as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.checkpoint.checkpoint import restore
from jaxlm.checkpoint.read_back import names_of
from jaxlm.config import TrainConfig
from jaxlm.run.metrics import print_status
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.state import Hyper, TrainState, init_state
from jaxlm.train.task import Batches, Task
from sharding.batches import globalize, local_rows


def restore_or_init(
  config: TrainConfig, task: Task, checkpoint: Path | None
) -> tuple[TrainState, Batches]:
  """Returns (state, iterator over this process's rows of each batch), from a checkpoint or anew.

  Hyperparameters are the configuration's, not the checkpoint's, so that a resumed run can change
  them.
  """
  batches = task.batches(local_rows(config.batch))
  if checkpoint is None:
    start = task.pretrained()
    initialize = jax.jit(lambda start: init_state(config, task, start), donate_argnums=0)
    state = initialize(start)
    if task.calibrates:
      params = _calibrate(config, task, state.params, batches)
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # donated by themselves
      state = state._replace(params=params, ema=ema)
    return state, batches
  like = jax.eval_shape(lambda: init_state(config, task))
  added = set()
  if task.calibrates:
    leaves = jax.tree_util.tree_leaves_with_path(like.params)
    added = {_dotted(path) for path, _ in leaves} - names_of(checkpoint / "params")
  state, position = restore(checkpoint, _without(like, added))
  batches.set_state(position)
  if added:
    print_status(f"scales that the checkpoint lacks start anew: {', '.join(sorted(added))}")
    state = _add(config, task, state, batches, added)
  return state._replace(hyper=jax.jit(lambda: Hyper.of(config))()), batches


def _calibrate(config: TrainConfig, task: Task, params: Any, batches: Batches) -> Any:
  """Returns parameters with what the task makes of the next batch, which stays the next one."""
  position = batches.get_state()
  batch = globalize(next(batches), config.batch)
  batches.set_state(position)
  return task.calibrate(params, batch)


def _add(
  config: TrainConfig, task: Task, state: TrainState, batches: Batches, added: Collection[str]
) -> TrainState:
  """Returns the state with the parameters `added`, calibrated, and the optimizer's zeros for them.

  The optimizer counts its steps from the run's start for these too.
  """
  params = _fill(_calibrate(config, task, state.params, batches), state.params)

  def init(params: Any) -> Any:
    return make_optimizer(config.optimizer, task.roles(params)).init(params)

  @jax.jit
  def init_added(params: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(init(params))
    return {jax.tree_util.keystr(path): x for path, x in leaves if _is_of(path, added)}

  new = init_added(params)
  opt_state = jax.tree_util.tree_map_with_path(
    lambda path, x: new.get(jax.tree_util.keystr(path), x), jax.eval_shape(init, params)
  )
  return state._replace(
    params=params,
    opt_state=_fill(opt_state, state.opt_state),
    ema=None if state.ema is None else _fill(jax.tree.map(jnp.copy, params), state.ema),
  )


def _fill(tree: Any, part: Any) -> Any:
  """Returns `tree` with the leaves of `part`, which has some of its paths, in place of its own."""
  leaves = jax.tree_util.tree_leaves_with_path(part)
  given = {jax.tree_util.keystr(path): x for path, x in leaves}
  return jax.tree_util.tree_map_with_path(
    lambda path, x: given.get(jax.tree_util.keystr(path), x), tree
  )


def _dotted(path: tuple[Any, ...]) -> str:
  return ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _is_of(path: tuple[Any, ...], names: Collection[str]) -> bool:
  """Returns whether a path of the optimizer's state, or of parameters, ends in one of the names."""
  dotted = f".{_dotted(path)}"
  return any(dotted.endswith(f".{name}") for name in names)


def _without(tree: Any, names: Collection[str], path: tuple[str, ...] = ()) -> Any:
  """Returns the tree without what belongs to these parameters, in all its nested dicts."""
  if isinstance(tree, dict):
    keys = [jax.tree_util.DictKey(name) for name in path]
    return {
      name: _without(part, names, (*path, name))
      for name, part in tree.items()
      if not _is_of((*keys, jax.tree_util.DictKey(name)), names)
    }
  if isinstance(tree, tuple):
    parts = [_without(part, names, path) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
  return tree
