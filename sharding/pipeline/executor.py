"""Runs a pipeline schedule as one program: a loop over ticks that all devices run alike.

In a tick a rank runs its operation (F, B, W or none) and sends what it made to both neighbours on
the ring of ranks: two permutes, empty or not, and nothing else crosses the `stage` axis inside the
loop. Whoever a message is for stores it. Operations may communicate over other axes, whose devices
all run the same one.

The program is fully manual (`jax.shard_map` over all axes). Every value inside varies over all
axes; gradients stay the devices' own shares until the loop is over.
"""

# P ranks, M micro-batches, R layers of a stack, v stages of a rank
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check
from sharding.manual import all_axes, gather_weights, keep_once, sum_gradients, vary
from sharding.pipeline.checker import check_table
from sharding.pipeline.instructions import (
  NOWHERE,
  Instruction,
  Instructions,
  branch_of,
  make_instructions,
)
from sharding.pipeline.operations import Schedule
from sharding.pipeline.placement import Placement
from sharding.pipeline.slots import Slots, entry_of
from sharding.pipeline.split_backward import SplitBackward, split_backward
from sharding.pipeline.table import make_table
from sharding.rules import manual_axes

Stacks = tuple[Any, ...]
"""Layers: one tree for each stack, whose arrays have a leading axis R in the order of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """Says what the stages compute; functions of one device's shards."""

  embed: Callable[[Any, Any], jax.Array]
  """(shared, micro-batch) -> the state before the first layer; run by the first stage"""
  layers: Callable[[Stacks, jax.Array, Any], jax.Array]
  """(some consecutive layers of each stack, x, micro-batch) -> x"""
  loss: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
  """(shared, x, micro-batch) -> (share of what is minimised, tree of sums); by the last stage"""


def pipelined_value_and_grad(
  pipeline: Pipeline, schedule: Schedule, layers: Sequence[Sequence[int]]
) -> Callable[[Stacks, Any, Any], tuple[tuple[jax.Array, Any], tuple[Stacks, Any]]]:
  """Returns f(stacks, shared, batch) -> ((minimised, sums), (gradients of stacks, of shared)).

  `layers` has, for each stage, how many layers of each stack it holds; they follow each other in
  the order of the model. `shared` are the parameters of `embed` and `loss`, which may be the same
  (a tied embedding): their gradients are summed over the stages once, at the end. `batch` is a tree
  of arrays [M, ...]; minimised and sums are added over its M micro-batches and all devices. f is
  called under a mesh with Explicit axes, `stage` among them, and takes how arrays lie from their
  types. The result is what jax.value_and_grad of all micro-batches' sum would give.

  Raises UserError where schedule, mesh and layers do not fit together.
  """
  rule = "only schedules that hold every stage once can run; this one is simulated only"
  check(len(schedule.placements) == 1, "schedule", schedule.name, rule)
  rule = f"needs one entry for each of the {schedule.stages} stages"
  check(len(layers) == schedule.stages, "layers", layers, rule)
  table = make_table(schedule)
  check_table(table)
  last = schedule.stages - 1
  signatures = [(tuple(n), s == 0, s == last) for s, n in enumerate(layers)]
  programs = list(dict.fromkeys(signatures))
  instructions = make_instructions(table, [programs.index(s) for s in signatures])
  placement = Placement.of(schedule, layers)

  def value_and_grad(stacks: Stacks, shared: Any, batch: Any) -> Any:
    ranks = jax.sharding.get_abstract_mesh().shape.get("stage", 1)
    rule = f"has {schedule.ranks} ranks, the mesh has stage={ranks}"
    check(ranks == schedule.ranks, "schedule", schedule.name, rule)
    rows = jax.tree.leaves(batch)[0].shape[0]
    rule = f"is for {schedule.microbatches} micro-batches, the batch has {rows}"
    check(rows == schedule.microbatches, "schedule", schedule.name, rule)
    placement.check(stacks)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (stacks, shared, batch))

    def on_device(stacks: Stacks, shared: Any, batch: Any) -> Any:
      rows = vary(placement.place(gather_weights(stacks, specs[0]), specs[0]))
      shared = vary(gather_weights(shared, specs[1]))
      # devices that split the vocabulary see the same rows: their loss is one, not several shares
      batch = vary(batch, alike=manual_axes("act_vocab"))
      ticks = _Ticks(pipeline, programs, instructions, rows, shared, batch)
      value_and_sums, drows, dshared = ticks.run()
      dstacks = placement.collect(drows, stacks, specs[0])
      value_and_sums = jax.lax.psum(value_and_sums, all_axes())
      return value_and_sums, (
        sum_gradients(dstacks, specs[0]),
        sum_gradients(dshared, specs[1]),
      )

    out_specs = (jax.sharding.PartitionSpec(), specs[:2])
    return jax.shard_map(on_device, in_specs=specs, out_specs=out_specs)(stacks, shared, batch)

  return value_and_grad


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
  """Holds what a device carries from tick to tick."""

  inbox: jax.Array  # [slots, ...] states and gradients that have arrived
  stash: list[jax.Array]
  kept: list[jax.Array]
  crossing: list[jax.Array]
  drows: Stacks
  dshared: Any
  sums: Any
  out: jax.Array
  """what the latest F or B has made, for the neighbours"""


def _run_if(wanted: jax.Array, function: Callable[[_State], _State], state: _State) -> _State:
  """Returns function(state) where `wanted`, else `state`, which no device copies.

  It is a loop of at most one turn. XLA lets the state of a loop lie where it is, but copies what a
  branch of a conditional passes on.
  """

  def once(count_and_state: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
    return count_and_state[0] - 1, function(count_and_state[1])

  count = wanted.astype(jnp.int32)
  return jax.lax.while_loop(lambda carry: carry[0] > 0, once, (count, state))[1]


class _Ticks:
  """Runs all ticks on one device, inside shard_map."""

  def __init__(
    self,
    pipeline: Pipeline,
    programs: list[tuple[tuple[int, ...], bool, bool]],
    instructions: Instructions,
    rows: Stacks,
    shared: Any,
    batch: Any,
  ):
    self.pipeline, self.programs, self.instructions = pipeline, programs, instructions
    self.rows, self.shared, self.batch = rows, shared, batch
    microbatch = self._microbatch(0)
    state = jax.eval_shape(pipeline.embed, shared, microbatch)
    self.idle = vary(jnp.zeros(state.shape, state.dtype))
    splits: dict[tuple[int, ...], SplitBackward] = {}
    for counts, _, _ in programs:
      if counts not in splits:
        own = self._rows(counts, 0)
        splits[counts] = split_backward(pipeline.layers, own, self.idle, microbatch)
    self.splits = [splits[counts] for counts, _, _ in programs]
    stashed_only = [[a for i, a in enumerate(s.stash) if i not in s.kept] for s in self.splits]
    self.stash = Slots(stashed_only, instructions.stash_slots)
    kept = [[s.stash[i] for i in s.kept] for s in self.splits]
    self.kept = Slots(kept, instructions.kept_slots)
    self.crossing = Slots([s.crossing for s in self.splits], instructions.crossing_slots)

  def run(self) -> tuple[Any, Stacks, Any]:
    """Returns this device's shares of ((minimised, sums), gradients of rows, of shared)."""
    rank, ranks = jax.lax.axis_index("stage"), jax.lax.axis_size("stage")
    right = [(i, (i + 1) % ranks) for i in range(ranks)]
    left = [(target, source) for source, target in right]
    # every F before every B, before every W: whoever reads a buffer comes after whoever writes it,
    # so that XLA need not copy it
    branches = [
      (branch_of(program, kind), functools.partial(run, program))
      for kind, run in (("F", self._forward), ("B", self._backward), ("W", self._weights))
      for program in range(len(self.programs))
    ]

    def tick(state: _State, at: Instruction) -> tuple[_State, None]:
      for branch, run in branches:
        state = _run_if(at.branch == branch, functools.partial(run, at), state)
      arrivals = (
        (at.from_left, jax.lax.ppermute(state.out, "stage", right)),
        (at.from_right, jax.lax.ppermute(state.out, "stage", left)),
        (at.from_self, state.out),
      )
      inbox = state.inbox
      for slot, array in arrivals:
        at_slot = jnp.maximum(slot, 0)
        array = jnp.where(slot == NOWHERE, entry_of(inbox, at_slot), array)
        inbox = jax.lax.dynamic_update_index_in_dim(inbox, array, at_slot, 0)
      return dataclasses.replace(state, inbox=inbox), None

    ticks = jax.tree.map(
      lambda column: entry_of(jnp.asarray(column), rank), self.instructions.ticks
    )
    state, _ = jax.lax.scan(tick, self._start(), ticks)
    return state.sums, state.drows, state.dshared

  def _start(self) -> _State:
    loss = jax.eval_shape(self.pipeline.loss, self.shared, self.idle, self._microbatch(0))
    inbox = jnp.zeros((self.instructions.inbox_slots, *self.idle.shape), self.idle.dtype)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (self.rows, self.shared, loss))
    drows, dshared, sums = vary(zeros)
    return _State(
      inbox=vary(inbox),
      stash=self.stash.empty(),
      kept=self.kept.empty(),
      crossing=self.crossing.empty(),
      drows=drows,
      dshared=dshared,
      sums=sums,
      out=self.idle,
    )

  def _forward(self, program: int, at: Instruction, state: _State) -> _State:
    counts, is_first, _ = self.programs[program]
    split, microbatch = self.splits[program], self._microbatch(at.microbatch)
    if is_first:
      x = vary(self.pipeline.embed(self.shared, microbatch))
    else:
      x = entry_of(state.inbox, at.inbox)
    y, stash = split.forward(self._rows(counts, at.chunk), x, microbatch)
    stash_only = [a for i, a in enumerate(stash) if i not in split.kept]
    kept = [stash[i] for i in split.kept]
    state = dataclasses.replace(
      state,
      stash=self.stash.write(state.stash, program, at.stash, stash_only),
      kept=self.kept.write(state.kept, program, at.kept, kept),
      out=vary(y),
    )
    return state

  def _backward(self, program: int, at: Instruction, state: _State) -> _State:
    counts, is_first, is_last = self.programs[program]
    split, microbatch = self.splits[program], self._microbatch(at.microbatch)
    dshared, sums = state.dshared, state.sums
    dy = entry_of(state.inbox, at.inbox)
    if is_last:  # what arrived is the last state
      value_and_grad = jax.value_and_grad(self.pipeline.loss, argnums=(0, 1), has_aux=True)
      value_and_sums, (more, dy) = value_and_grad(self.shared, dy, microbatch)
      sums = jax.tree.map(jnp.add, sums, keep_once(value_and_sums))
      dshared = jax.tree.map(lambda total, g: total + vary(g), dshared, more)
    kept = self.kept.read(state.kept, program, at.kept)
    stash_only = iter(self.stash.read(state.stash, program, at.stash))
    stash = [
      kept[split.kept.index(i)] if i in split.kept else next(stash_only)
      for i in range(len(split.stash))
    ]
    dx, crossing = split.input_gradient(self._rows(counts, at.chunk), microbatch, stash, vary(dy))
    if is_first:
      _, pull_back = jax.vjp(lambda shared: self.pipeline.embed(shared, microbatch), self.shared)
      dshared = jax.tree.map(lambda total, g: total + vary(g), dshared, *pull_back(dx))
    state = dataclasses.replace(
      state,
      crossing=self.crossing.write(state.crossing, program, at.crossing, crossing),
      dshared=dshared,
      sums=sums,
      out=vary(dx),
    )
    return state

  def _weights(self, program: int, at: Instruction, state: _State) -> _State:
    counts, _, _ = self.programs[program]
    own = self._rows(counts, at.chunk)
    kept = self.kept.read(state.kept, program, at.kept)
    crossing = self.crossing.read(state.crossing, program, at.crossing)
    microbatch = self._microbatch(at.microbatch)
    gradients = self.splits[program].weight_gradient(own, microbatch, kept, crossing)

    def add(total: jax.Array, gradient: jax.Array) -> jax.Array:
      start = [at.chunk] + [0] * gradient.ndim
      now = jax.lax.dynamic_slice(total, start, (1, *gradient.shape))
      return jax.lax.dynamic_update_slice(total, now + vary(gradient)[None], start)

    drows = jax.tree.map(add, state.drows, gradients)
    return dataclasses.replace(state, drows=drows)

  def _rows(self, counts: tuple[int, ...], chunk: Any) -> Stacks:
    """Returns the layers of one of the rank's stages."""
    return tuple(
      jax.tree.map(lambda w, n=n: entry_of(w, chunk)[:n], stack)
      for n, stack in zip(counts, self.rows, strict=True)
    )

  def _microbatch(self, number: Any) -> Any:
    return jax.tree.map(lambda a: entry_of(a, number), self.batch)
