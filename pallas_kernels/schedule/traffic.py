"""Counts the HBM traffic of Pallas calls by replaying their index maps over the grid.

The automatic pipeline copies a block whenever its index changes from one step to the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.state.discharge import discharge_state

from pallas_kernels.common.errors import UserError

Walk = Generator["Call", None, list[Any]]


@dataclasses.dataclass
class Call:
  """Describes one pallas_call of a program."""

  name: str
  """Empty where the program gives none."""
  grid: tuple[int, ...]
  calls: int
  """Times that the program runs it: the product of the lengths of the scans around it."""
  moved: float
  """Bytes that one run copies between HBM and VMEM."""
  needed: float
  """Bytes of its operands and results, each once."""
  copy_steps: int
  """Grid steps that start a copy."""
  notes: list[str]

  @property
  def steps(self) -> int:
    """Returns the number of grid steps."""
    return math.prod(self.grid)


def pallas_calls(
  jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any], calls: int = 1
) -> Walk:
  """Yields every pallas_call below `jaxpr`, and returns the values of the results.

  Operands that are not known are None; what follows from known ones is computed.
  """
  known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, operands))

  def read(atom: Any) -> Any:
    return atom.val if hasattr(atom, "val") else known.get(atom)

  for eqn in jaxpr.eqns:
    values = [read(atom) for atom in eqn.invars]
    results: Sequence[Any] = ()
    inner = [eqn.params[name] for name in ("jaxpr", "call_jaxpr", "branches") if name in eqn.params]
    if eqn.primitive.name == "pallas_call":
      yield count_traffic(eqn, values, calls)
    elif eqn.primitive.name in ("scan", "while", "cond") or not inner:
      times = calls * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else calls
      for body in inner_jaxprs(eqn.params):
        yield from pallas_calls(body, (), [None] * len(body.invars), times)
      if all(value is not None for value in values) and eqn.primitive.name not in (
        "scan",
        "while",
        "cond",
      ):
        results = evaluate_equation(eqn, values)
    else:
      closed = inner[0]
      body, body_consts = (
        (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
      )
      results = yield from pallas_calls(body, body_consts, values, calls)
    known.update(zip(eqn.outvars, results))
  return [read(atom) for atom in jaxpr.outvars]


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the jaxprs among the parameters of an equation."""
  for value in params.values():
    for leaf in value if isinstance(value, tuple | list) else (value,):
      leaf = getattr(leaf, "jaxpr", leaf)
      if hasattr(leaf, "eqns"):
        yield leaf


def evaluate_equation(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
  """Returns the results of one equation whose operands are known."""
  with jax.default_device(jax.devices("cpu")[0]):
    results = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
  return results if eqn.primitive.multiple_results else [results]


def count_traffic(eqn: Any, values: list[Any], calls: int) -> Call:
  """Returns the traffic of one pallas_call whose operands have these values (None: unknown)."""
  mapping, notes = eqn.params["grid_mapping"], []
  bounds = sum(not isinstance(size, int) for size in mapping.grid)
  if any(value is None for value in values[:bounds]):
    raise UserError(
      f"{eqn.params['name']}: its grid depends on data, pass concrete arguments in place of shapes"
    )
  sizes = iter(values)
  grid = tuple(size if isinstance(size, int) else int(next(sizes)) for size in mapping.grid)
  prefetch = list(zip(values[bounds:], eqn.invars[bounds:]))[: mapping.num_index_operands]
  moved, needed, busy = 0.0, 0.0, np.zeros(math.prod(grid), bool)
  for block in mapping.block_mappings:
    item = item_size(block.array_aval.dtype)
    needed += item * math.prod(block.array_aval.shape)
    space = str(block.transformed_block_aval.memory_space).lower()
    if any(word in space for word in ("any", "hbm", "smem", "semaphore")):
      notes.append(
        f"{block.origin}: stays in {space}, what the kernel copies itself is not counted"
      )
      continue
    shape = [
      getattr(size, "block_size", size if isinstance(size, int) else 1) or 1
      for size in block.block_shape
    ]
    change = changes(block, grid, prefetch, len(shape))
    if change is None:
      notes.append(f"{block.origin}: its index depends on data, counted as copied at every step")
      change = np.ones(math.prod(grid), bool)
    moved += item * math.prod(shape) * int(change.sum())
    busy |= change
  return Call(eqn.params["name"] or "", grid, calls, moved, needed, int(busy.sum()), notes)


def changes(block: Any, grid: tuple[int, ...], prefetch: list[Any], rank: int) -> np.ndarray | None:
  """Returns at which grid steps the block's index changes; None where that depends on data.

  Unknown scalar-prefetch operands are replaced by two different fillings: if both give the same
  steps, as for an index that is fixed during the call, the values do not matter.
  """
  unknown = any(value is None for value, _ in prefetch)
  steps_by_filling = []
  for filling in (0, 1) if unknown else (0,):
    scalars = [
      fill(atom.aval, filling) if value is None else np.asarray(value) for value, atom in prefetch
    ]
    steps_by_filling.append(index_changes(block, grid, scalars, rank))
  first, *others = steps_by_filling
  return first if all(np.array_equal(first, other) for other in others) else None


def fill(aval: Any, filling: int) -> np.ndarray:
  """Returns zeros, or numbers of which neighbours differ."""
  size = math.prod(aval.shape)
  return (filling * (np.arange(size) * 7 % 5)).reshape(aval.shape).astype(aval.dtype)


def index_changes(block: Any, grid: tuple[int, ...], scalars: list[Any], rank: int) -> np.ndarray:
  """Returns at which grid steps the index differs from the one before, given all scalars."""
  steps = math.prod(grid)
  change = np.ones(steps, bool)
  if grid:
    plain = discharge_state(block.index_map_jaxpr)
    ids = [axis.astype(np.int32) for axis in np.indices(grid).reshape(len(grid), -1)]

    def index(*at: Any) -> Any:
      return jax.core.eval_jaxpr(plain.jaxpr, plain.consts, *at, *scalars)[:rank]

    with jax.default_device(jax.devices("cpu")[0]):
      at = np.stack([np.broadcast_to(axis, steps) for axis in jax.jit(jax.vmap(index))(*ids)])
    change[1:] = (np.diff(at, axis=1) != 0).any(axis=0)
  return change


def item_size(dtype: Any) -> float:
  """Returns the bytes of an element in HBM; half a byte for int4."""
  return 0.5 if "int4" in str(dtype) else getattr(dtype, "itemsize", 4)
