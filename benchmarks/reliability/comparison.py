"""Reads what a run left in its folder, and tells whether two runs ended alike."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.checkpoint import restore
from jaxlm.checkpoint.folder import checkpoint_path
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from sharding import make_mesh


def last_step(folder: RunFolder) -> int:
  """Returns the last step in metrics.jsonl, or 0."""
  return max((record["step"] for record in records(folder)), default=0)


def records(folder: RunFolder) -> list[dict[str, Any]]:
  """Returns what a repeated run must repeat exactly: metrics.jsonl without its times."""
  if not folder.metrics.exists():
    return []
  return [
    {name: value for name, value in record.items() if "seconds" not in name}
    for record in read_records(folder.metrics)
  ]


def same_end(folder: RunFolder, other: RunFolder) -> bool:
  """Returns whether two runs have equal curves, evaluations and final states, bit for bit."""
  if records(folder) != records(other) or folder.evals.read_text() != other.evals.read_text():
    return False
  ours = _final_state(folder)
  theirs = _final_state(other)
  return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
    np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
  )


def _final_state(folder: RunFolder) -> Any:
  config = folder.read_config()
  with jax.set_mesh(make_mesh(config.mesh)):
    like = jax.eval_shape(lambda: init_state(config, TextTask(config)))
    state, position = restore(checkpoint_path(folder.checkpoints, config.steps), like)
  state = state._replace(key=jax.random.key_data(state.key))
  return jax.device_get(state), json.dumps(position, sort_keys=True)
