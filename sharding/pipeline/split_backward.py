"""Splits the backward pass of a stage into B, its input's gradient, and W, that of its weights.

Two independent pull-backs would not do: what leads to the gradient of a weight is the whole chain
of cotangents, so that W would compute B again. Here both are slices of one traced program. B keeps
the cotangents that W needs ("crossing"), and W starts from them. The idea of the split is that of
Qi et al. 2024 (arXiv 2401.10241, section 2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Arrays = list[jax.Array]
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class SplitBackward:
  """Holds a stage's forward pass and the two parts of its backward pass, as functions of arrays."""

  forward: Callable[[Any, jax.Array, Any], tuple[jax.Array, Arrays]]
  """(params, x, batch) -> (y, stash): the residuals, without those that parameters or batch give"""
  input_gradient: Callable[[Any, Any, Arrays, jax.Array], tuple[jax.Array, Arrays]]
  """B: (params, batch, stash, dy) -> (dx, crossing)"""
  weight_gradient: Callable[[Any, Any, Arrays, Arrays], Any]
  """W: (params, batch, the kept entries of the stash, crossing) -> dparams"""
  stash: tuple[Any, ...]
  """Types (`jax.typeof`) of what is kept from F on."""
  kept: tuple[int, ...]
  """Entries of the stash that W reads; the others are free after B."""
  crossing: tuple[Any, ...]

  @property
  def bytes_until_input_gradient(self) -> int:
    """Returns the bytes that a micro-batch holds between F and B (M_B)."""
    return _bytes(self.stash)

  @property
  def bytes_until_weight_gradient(self) -> int:
    """Returns the bytes that a micro-batch holds between B and W (M_W).

    Under rematerialisation it may exceed M_B: what B computed again W is given.
    """
    return _bytes(self.crossing) + _bytes(self.stash[i] for i in self.kept)


class _Step(NamedTuple):
  """Is one primitive operation of the flattened program; values are numbered."""

  eqn: JaxprEqn
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  is_backward: bool
  """it needs dy, or recomputes what a rematerialised backward pass needs"""


class _Program:
  """Holds forward and backward pass as one list of steps, all calls inlined."""

  def __init__(self, closed: ClosedJaxpr, cotangents: range):
    self._numbers = itertools.count()
    self.steps: list[_Step] = []
    self.types: dict[int, Any] = {}
    self.constants: dict[int, Any] = {}
    self.inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
    self._late = {self.inputs[i] for i in cotangents}
    self.outputs = self._flatten(closed, self.inputs, False)

  def _new(self, aval: Any) -> int:
    number = next(self._numbers)
    self.types[number] = aval
    return number

  def _constant(self, value: Any, aval: Any) -> int:
    number = self._new(aval)
    self.constants[number] = value
    return number

  def _flatten(self, closed: ClosedJaxpr, inputs: list[int], is_backward: bool) -> list[int]:
    jaxpr = closed.jaxpr
    number_of = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
      number_of[var] = self._constant(value, var.aval)

    def read(atom: Any) -> int:
      if isinstance(atom, Literal):
        return self._constant(atom.val, atom.aval)
      return number_of[atom]

    for eqn in jaxpr.eqns:
      arguments = [read(atom) for atom in eqn.invars]
      late = is_backward or not self._late.isdisjoint(arguments)
      inner = _inner(eqn)
      if inner is None:
        outputs = [self._new(var.aval) for var in eqn.outvars]
        self.steps.append(_Step(eqn, tuple(arguments), tuple(outputs), late))
        self._late.update(outputs if late else ())
      else:
        recomputes = eqn.primitive.name in ("remat2", "checkpoint") and late
        outputs = self._flatten(inner, arguments, is_backward or recomputes)
      number_of.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def depend_on(self, sources: Iterable[int]) -> set[int]:
    """Returns all values that need one of `sources`, these included."""
    dependent = set(sources)
    for step in self.steps:
      if not dependent.isdisjoint(step.inputs):
        dependent.update(step.outputs)
    return dependent

  def run(self, steps: Sequence[_Step], values: dict[int, Any], wanted: Sequence[int]) -> Arrays:
    """Runs those of `steps` that `wanted` needs, given some values."""
    values = self.constants | values
    for step in _slice(steps, wanted):
      eqn = step.eqn
      parameters = eqn.primitive.get_bind_params(eqn.params)
      with eqn.ctx.manager:
        out = eqn.primitive.bind(*(values[i] for i in step.inputs), **parameters)
      values.update(zip(step.outputs, out if eqn.primitive.multiple_results else [out]))
    return [jnp.asarray(values[i]) for i in wanted]


def _inner(eqn: JaxprEqn) -> ClosedJaxpr | None:
  """Returns the program that an equation calls, if it does nothing but call it."""
  if eqn.primitive.name not in _CALLS:
    return None
  inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
  return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


def _slice(steps: Sequence[_Step], wanted: Iterable[int]) -> list[_Step]:
  """Returns the steps that `wanted` needs, in order."""
  needed, used = set(wanted), []
  for step in reversed(steps):
    if not needed.isdisjoint(step.outputs):
      used.append(step)
      needed.update(step.inputs)
  return used[::-1]


def split_backward(
  stage: Callable[[Any, jax.Array, Any], jax.Array], params: Any, x: jax.Array, batch: Any = ()
) -> SplitBackward:
  """Returns the parts of `stage(params, x, batch) -> y` and of its backward pass.

  The arguments give shapes, dtypes and, inside shard_map, over which axes values vary; their values
  are not used. `batch` is a tree that gets no gradient and that B and W are given again. What
  follows from the parameters alone (casts, slices) is computed in each part instead of kept. A
  `lax.scan` is one operation, and all of it goes into B: unroll the layers of a stage.
  """
  y_type = jax.eval_shape(stage, params, x, batch)

  def both(params: Any, x: jax.Array, batch: Any, dy: jax.Array) -> Any:
    y, pull_back = jax.vjp(lambda params, x: stage(params, x, batch), params, x)
    return y, *pull_back(dy)

  closed, types = jax.make_jaxpr(both, return_shape=True)(params, x, batch, y_type)
  counts = [len(jax.tree.leaves(tree)) for tree in (params, x, batch, y_type)]
  params_end, x_end, batch_end, end = itertools.accumulate(counts)
  program = _Program(closed, range(batch_end, end))
  params_ids, batch_ids = program.inputs[:params_end], program.inputs[x_end:batch_end]
  x_id, dy_id = program.inputs[params_end], program.inputs[batch_end]
  y_id, *dparams_ids, dx_id = program.outputs

  data = program.depend_on(program.inputs[params_end:])
  free = {step.outputs for step in program.steps if data.isdisjoint(step.outputs)}
  backward = [s for s in program.steps if s.is_backward and s.outputs not in free]
  in_B = {step.outputs for step in _slice(backward, [dx_id])}
  in_W = {step.outputs for step in _slice(backward, dparams_ids)} - in_B
  made_by_B = {dy_id, *itertools.chain.from_iterable(in_B)}

  def read_by(part: set[tuple[int, ...]], outputs: list[int]) -> list[int]:
    """Returns what a part reads of what it does not make, without parameters and batch."""
    reads = [i for step in program.steps if step.outputs in part for i in step.inputs]
    own = set(itertools.chain.from_iterable(part))
    return [i for i in dict.fromkeys(reads + outputs) if i in data - own and i not in batch_ids]

  read_by_W = read_by(in_W, dparams_ids)
  crossing = [i for i in read_by_W if i in made_by_B]
  kept = [i for i in read_by_W if i not in made_by_B]
  stash = list(dict.fromkeys(i for i in read_by(in_B, [dx_id]) + kept if i != dy_id))

  def values_of(params: Any, batch: Any, *more: tuple[list[int], Arrays]) -> dict[int, Any]:
    pairs = [(params_ids, jax.tree.leaves(params)), (batch_ids, jax.tree.leaves(batch)), *more]
    return {i: value for ids, arrays in pairs for i, value in zip(ids, arrays, strict=True)}

  def forward(params: Any, x: jax.Array, batch: Any) -> tuple[jax.Array, Arrays]:
    values = values_of(params, batch, ([x_id], [x]))
    y, *stashed = program.run(program.steps, values, [y_id, *stash])
    return y, stashed

  def input_gradient(
    params: Any, batch: Any, stashed: Arrays, dy: jax.Array
  ) -> tuple[jax.Array, Arrays]:
    values = values_of(params, batch, (stash, stashed), ([dy_id], [dy]))
    steps = [s for s in program.steps if s.outputs in free | in_B]
    dx, *crossed = program.run(steps, values, [dx_id, *crossing])
    return dx, crossed

  def weight_gradient(params: Any, batch: Any, kept_arrays: Arrays, crossed: Arrays) -> Any:
    values = values_of(params, batch, (kept, kept_arrays), (crossing, crossed))
    steps = [s for s in program.steps if s.outputs in free | in_W]
    return jax.tree.unflatten(jax.tree.structure(types[1]), program.run(steps, values, dparams_ids))

  return SplitBackward(
    forward,
    input_gradient,
    weight_gradient,
    tuple(program.types[i] for i in stash),
    tuple(stash.index(i) for i in kept),
    tuple(program.types[i] for i in crossing),
  )


def _bytes(arrays: Iterable[Any]) -> int:
  return sum(array.size * array.dtype.itemsize for array in arrays)
