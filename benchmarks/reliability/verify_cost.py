"""Times what verifying a checkpoint adds to restoring it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.checkpoint.checkpoint import Checkpoints, restore
from jaxlm.checkpoint.folder import checkpoint_path, newest_sound
from jaxlm.train import Hyper, TrainState
from sharding import MeshConfig, make_mesh


def measure(folder: Path, megabytes: int, repeats: int) -> tuple[float, float]:
  """Returns the median seconds of (restore, verify and restore) with files in the page cache."""
  rows = megabytes * 10**6 // (3 * 8 * 4 * 1024)

  def init() -> TrainState:
    weights = {
      f"w{index}": jax.random.normal(jax.random.key(index), (rows, 1024)) for index in range(8)
    }
    moments = jax.tree.map(lambda w: w**2, weights)
    return TrainState(
      step=jnp.int32(1),
      params=weights,
      frozen={},
      model_state={},
      opt_state=(weights, moments),
      ema=None,
      key=jax.random.key(0),
      hyper=Hyper(jnp.float32(0), jnp.float32(0), jnp.int32(1)),
    )

  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(jax.jit(init)(), {})
    assert checkpoints.close() == 1
    like = jax.eval_shape(init)
    plain, verified = [], []
    for _ in range(repeats):  # in turns, so that a change of the machine's speed meets both
      plain.append(_seconds(lambda: restore(checkpoint_path(folder, 1), like)))
      verified.append(
        _seconds(lambda: restore(checkpoint_path(folder, newest_sound(folder)), like))
      )
  return statistics.median(plain), statistics.median(verified)


def _seconds(action) -> float:
  start = time.perf_counter()
  jax.block_until_ready(action())
  return time.perf_counter() - start
