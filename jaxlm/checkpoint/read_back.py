"""Reads back a checkpoint that was just written, so that none is certified that cannot be read.

And lists what an older one holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

Shapes = Mapping[str, list[tuple[tuple[int, ...], str]]]
"""item -> sorted (shape, dtype) of its arrays"""


def shapes_of(items: Mapping[str, Any]) -> Shapes:
  """Returns the shapes of trees of arrays, as a checkpoint states them: keys are uint32 there."""
  return {name: _shapes(jax.tree.leaves(tree)) for name, tree in items.items()}


def check_readable(path: Path, written: Shapes) -> None:
  """Raises an error where a checkpoint does not hold these arrays or cannot be read.

  Opens every array, and reads the smallest one of each item. `path` is one that Orbax takes.
  """
  handler = ocp.PyTreeCheckpointHandler()
  for item, shapes in written.items():
    tree = handler.metadata(path / item).tree
    leaves = jax.tree.leaves(tree)
    if _shapes(leaves) != shapes:
      raise ValueError(f"{item} reads back with other arrays than were written")
    smallest = min(leaves, key=lambda leaf: math.prod(leaf.shape))
    wanted = jax.tree.map(functools.partial(_placeholder_but_for, smallest), tree)
    as_array = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    handler.restore(path / item, args=ocp.args.PyTreeRestore(wanted, restore_args=as_array))


def names_of(item: Path) -> set[str]:
  """Returns the dotted names of the arrays that one item of a checkpoint holds."""
  tree = ocp.PyTreeCheckpointHandler().metadata(item.absolute()).tree
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}


def _placeholder_but_for(wanted: Any, leaf: Any) -> Any:
  return leaf if leaf is wanted else ocp.PLACEHOLDER


def _shapes(leaves: list[Any]) -> list[tuple[tuple[int, ...], str]]:
  return sorted((tuple(x.shape), str(np.dtype(x.dtype))) for x in map(_stored, leaves))


def _stored(x: Any) -> Any:
  is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.eval_shape(jax.random.key_data, x) if is_key else x
