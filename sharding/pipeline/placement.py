"""Says which layers lie on which rank of a pipeline, and brings them there and back once a step."""

# P ranks, R layers of a stack, v stages of a rank, n layers of a stack in a stage at most
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.common.checks import check
from sharding.manual import vary
from sharding.pipeline.operations import Schedule


class Round(NamedTuple):
  """Is one permute over the ranks: each sends one layer at most, and receives one at most."""

  pairs: list[tuple[int, int]]
  """(source, target); a rank may be both"""
  rows: np.ndarray
  """[P] which of its layers at rest a rank sends"""
  places: np.ndarray
  """[P] where a rank puts what it receives; beyond its last place where it receives nothing"""


@dataclasses.dataclass(frozen=True)
class Placement:
  """Holds, for each stack, the layer in every place of every rank.

  At rest a stack's layers are split over `stage` in the order of the model, where the number of
  ranks divides them, and otherwise lie on every rank. Where this is not the order of the stages
  (several stages per rank, or stages of unequal size), each layer travels to its rank in a step,
  and its gradient back.
  """

  layers: tuple[np.ndarray, ...]
  """[P, v, n] of each stack; -1 is a place that stays empty, in a stage of fewer than n layers"""
  counts: tuple[int, ...]
  """layers of each stack, R"""

  @classmethod
  def of(cls, schedule: Schedule, layers: Sequence[Sequence[int]]) -> Placement:
    """Returns the placement of stages that hold these numbers of layers of each stack."""
    P, v = schedule.ranks, schedule.chunks
    counts_SK = np.asarray(layers)
    starts_SK = np.cumsum(counts_SK, axis=0) - counts_SK
    index = [np.full((P, v, n), -1) for n in counts_SK.max(axis=0)]
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
      w = vary(w)
      if not _is_split(spec):
        return w[_of_rank(np.maximum(index, 0))]
      if _is_in_order(index, w.shape[0]):
        return w[None]
      places = vary(jnp.zeros((index[0].size, *w.shape[1:]), w.dtype))
      for pairs, rows, targets in _rounds(index, w.shape[0]):
        layer = jax.lax.ppermute(w[_of_rank(rows)], "stage", pairs)
        places = places.at[_of_rank(targets)].set(layer, mode="drop")
      return places.reshape(*index.shape[1:], *w.shape[1:])

    return _map_stacks(place, self.layers, stacks, specs)

  def collect(self, rows: Sequence[Any], stacks: Sequence[Any], specs: Sequence[Any]) -> Any:
    """Returns shares of gradients in the order of the model, of gradients of `place`'s layers.

    Where they are not split over `stage` each rank has the whole stack, zero but for its own.
    """

    def collect(index: np.ndarray, g: jax.Array, w: jax.Array, spec: PartitionSpec) -> jax.Array:
      R = w.shape[0]
      if _is_split(spec) and _is_in_order(index, R):
        return g[0]
      gradient = vary(jnp.zeros((R, *g.shape[2:]), g.dtype))
      if not _is_split(spec):
        layers = _of_rank(np.where(index < 0, R, index))
        return gradient.at[layers].set(g, mode="drop")
      places = g.reshape(-1, *g.shape[2:])
      for pairs, targets, sources in _rounds(index, R):
        layer = places[_of_rank(np.minimum(sources, len(places) - 1))]
        layer = jax.lax.ppermute(layer, "stage", [(target, source) for source, target in pairs])
        senders = {source for source, _ in pairs}
        sent = np.array([target if r in senders else R for r, target in enumerate(targets)])
        gradient = gradient.at[_of_rank(sent)].set(layer, mode="drop")
      return gradient

    return _map_stacks(collect, self.layers, rows, stacks, specs)


def _rounds(index: np.ndarray, rows: int) -> list[Round]:
  """Returns permutes that bring every layer from the rank that has it at rest to its place.

  Each layer goes in the first one in which neither of its two ranks is taken.
  """
  P, places = len(index), index[0].size
  rounds: list[Round] = []
  for target, layers in enumerate(index.reshape(P, places)):
    for place, layer in enumerate(layers):
      if layer < 0:
        continue
      source = int(layer) // rows
      is_open = [all(source != a and target != b for a, b in pairs) for pairs, _, _ in rounds]
      if not any(is_open):
        rounds.append(Round([], np.zeros(P, int), np.full(P, places)))
      chosen = rounds[[*is_open, True].index(True)]
      chosen.pairs.append((source, target))
      chosen.rows[source], chosen.places[target] = layer % rows, place
  return rounds


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
