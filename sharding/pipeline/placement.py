"""Says which layers lie on which rank of a pipeline, and brings them there and back once a step."""

# P ranks, R layers of a stack, v stages of a rank, n layers of a stack in a stage at most
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.common.checks import check
from sharding.manual import vary
from sharding.pipeline.operations import Schedule


@dataclasses.dataclass(frozen=True)
class Placement:
  """Holds, for each stack, the layer in every place of every rank.

  At rest a stack's layers are split over `stage` in the order of the model, where the number of
  ranks divides them, and otherwise lie on every rank. Where this is not the order of the stages
  (several stages per rank, or stages of unequal size), each step gathers the stack over `stage`.
  """

  layers: tuple[np.ndarray, ...]
  """[P, v, n] of each stack; a stage with fewer than n layers leaves the last places unused"""
  counts: tuple[int, ...]
  """layers of each stack, R"""

  @classmethod
  def of(cls, schedule: Schedule, layers: Sequence[Sequence[int]]) -> Placement:
    """Returns the placement of stages that hold these numbers of layers of each stack."""
    P, v = schedule.ranks, schedule.chunks
    counts_SK = np.asarray(layers)
    starts_SK = np.cumsum(counts_SK, axis=0) - counts_SK
    index = [np.zeros((P, v, n), int) for n in counts_SK.max(axis=0)]
    for rank in range(P):
      own_stages = [s for s in range(schedule.stages) if schedule.rank_of(s, 0) == rank]
      for chunk, stage in enumerate(own_stages):
        for stack, n in enumerate(counts_SK[stage]):
          index[stack][rank, chunk, :n] = starts_SK[stage, stack] + np.arange(n)
    return cls(tuple(index), tuple(int(R) for R in counts_SK.sum(axis=0)))

  def check(self, stacks: Sequence[Any]) -> None:
    """Raises UserError unless the stages hold every layer of every stack."""
    sizes = tuple(jax.tree.leaves(stack)[0].shape[0] for stack in stacks)
    check(sizes == self.counts, "layers", self.counts, f"the stacks have {sizes} layers")

  def place(self, stacks: Sequence[Any], specs: Sequence[Any]) -> tuple[Any, ...]:
    """Returns this rank's layers [v, n, ...], of stacks that lie as their specs say."""

    def place(index: np.ndarray, w: jax.Array, spec: PartitionSpec) -> jax.Array:
      if _is_split(spec):
        if _is_in_order(index, w.shape[0]):
          return w[None]
        w = jax.lax.all_gather(w, "stage", axis=0, tiled=True)
      return vary(w)[_of_rank(index)]

    return _map_stacks(place, self.layers, stacks, specs)

  def collect(self, rows: Sequence[Any], stacks: Sequence[Any], specs: Sequence[Any]) -> Any:
    """Returns shares of gradients in the order of the model, of gradients of `place`'s layers.

    Where they are not split over `stage` each rank has the whole stack, zero but for its own.
    """

    def collect(index: np.ndarray, g: jax.Array, w: jax.Array, spec: PartitionSpec) -> jax.Array:
      if _is_split(spec) and _is_in_order(index, w.shape[0]):
        return g[0]
      R = w.shape[0] * (jax.lax.axis_size("stage") if _is_split(spec) else 1)
      whole = vary(jnp.zeros((R, *g.shape[2:]), g.dtype)).at[_of_rank(index)].add(g)
      if not _is_split(spec):
        return whole
      return jax.lax.psum_scatter(whole, "stage", scatter_dimension=0, tiled=True)

    return _map_stacks(collect, self.layers, rows, stacks, specs)


def _is_split(spec: PartitionSpec) -> bool:
  return len(spec) > 0 and spec[0] == "stage"


def _is_in_order(index: np.ndarray, rows: int) -> bool:
  """Tells whether every rank's layers are those it holds at rest."""
  return index.shape[1:] == (1, rows) and bool((index.ravel() == np.arange(index.size)).all())


def _of_rank(index: np.ndarray) -> jax.Array:
  return jnp.asarray(index)[jax.lax.axis_index("stage")]


def _map_stacks(function: Any, layers: Sequence[np.ndarray], *trees: Sequence[Any]) -> Any:
  return tuple(
    jax.tree.map(lambda *leaves, index=index: function(index, *leaves), *stacks)
    for index, *stacks in zip(layers, *trees, strict=True)
  )
