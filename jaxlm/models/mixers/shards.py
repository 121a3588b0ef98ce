"""Runs what a mixer does between its projections on every device's own rows and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.shards import run_on_shards, vary_together
from sharding.rules import is_sharded, spec, split_count

_SPLIT = {"B": "batch", "N": "act_heads", "K": "act_heads", "Z": "act_heads"}


def run_on_rows_and_heads(
  function: Callable[..., dict[str, jax.Array]],
  arrays: Mapping[str, jax.Array | None],
  outputs: Sequence[str],
) -> dict[str, jax.Array]:
  """Returns `function(**arrays)`, on a mesh computed by every device from its own part.

  The names of arrays and of the results end in a letter for each axis: B is split like a batch
  (unless it is 1), N, K and Z (heads, key heads, heads times width) like heads, others are whole.
  Arrays that are None are left out. The function must return a dict with the names `outputs`.
  """
  given = {name: array for name, array in arrays.items() if array is not None}
  if not is_sharded():
    return function(**given)

  def local(*shards: jax.Array) -> tuple[jax.Array, ...]:
    floats = [jnp.issubdtype(shard.dtype, jnp.floating) for shard in shards]
    varied = iter(vary_together(*(x for x, is_float in zip(shards, floats) if is_float)))
    alike = [next(varied) if is_float else x for x, is_float in zip(shards, floats)]
    results = function(**dict(zip(given, alike)))
    return tuple(results[name] for name in outputs)

  layouts = []
  for name, array in given.items():
    names = [_logical(letter, size) for letter, size in zip(_letters(name), array.shape)]
    partitions = spec(array.shape, *names)
    layouts.append(tuple((x,) if isinstance(x, str) else tuple(x or ()) for x in partitions))
  # a size of 0 divides over any mesh: the sizes of results are those of inputs
  out_specs = tuple(spec((0,) * len(_letters(n)), *map(_logical, _letters(n))) for n in outputs)
  results = run_on_shards(local, tuple(given.values()), tuple(layouts), out_specs)
  return dict(zip(outputs, results))


def _letters(name: str) -> str:
  return name.rsplit("_", 1)[1]


def _logical(letter: str, size: int = 0) -> str | None:
  return None if letter == "B" and size == 1 else _SPLIT.get(letter)


def check_whole_rows(mixer: str, in_order: bool, cached: bool) -> None:
  """Raises UnsupportedError where rows lie over several devices or may be in another order."""
  if (parts := split_count("length")) > 1:
    axes = "mesh.context_ring x mesh.context_ulysses"
    raise UnsupportedError(
      f"{mixer}: it goes through a row from left to right, on one device; {axes}={parts} must be 1"
    )
  if not (in_order or cached):
    raise UnsupportedError(
      f"{mixer}: it goes by the order of the row, whatever positions say; promise in_order=True"
    )
