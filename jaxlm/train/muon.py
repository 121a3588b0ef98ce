"""Orthogonalises the momentum of stacked matrices, each on one device: the Muon optimizer."""

# L stacked matrices (layers, experts), D rows, E columns

from __future__ import annotations

import collections
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sharding.rules import is_sharded, mesh_shape

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonState(NamedTuple):
  """Holds the momentum of each matrix and the number of updates, which corrects its bias."""

  count: jax.Array  # type: ignore[assignment]  # int32
  momentum: Any


def scale_by_muon(beta: float, eps: float, scale: float) -> optax.GradientTransformation:
  """Returns Muon for arrays [..., D, E]: orthogonalised Nesterov momentum (Jordan 2024).

  Its root mean square is about `scale` (Liu et al. 2025, arXiv 2502.16982, equation 4). Momentum is
  a mean whose bias is corrected, as in `optax.contrib.muon`.
  """

  def init(params: Any) -> MuonState:
    return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

  def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
    count = state.count + 1
    momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
    unbiased = 1 - beta**count
    next_unbiased = 1 - beta ** (count + 1)

    def nesterov(m: jax.Array, g: jax.Array) -> jax.Array:
      return (beta / next_unbiased) * m + ((1 - beta) / unbiased) * g

    def rescale(x: jax.Array) -> jax.Array:
      return scale * math.sqrt(max(x.shape[-2:])) * x

    directions = orthogonalize(jax.tree.map(nesterov, momentum, grads), eps)
    return jax.tree.map(rescale, directions), MuonState(count, momentum)

  return optax.GradientTransformation(init, update)


def orthogonalize(tree: Any, eps: float) -> Any:
  """Returns the matrices [..., D, E] with singular values moved close to 1, sharded as before.

  Those of one weight in several stacks of layers are computed at once, if they are sharded alike:
  arrays whose paths differ in numbers alone.
  """
  leaves, structure = jax.tree.flatten_with_path(tree)
  groups = collections.defaultdict[Any, list[int]](list)
  for index, (path, x) in enumerate(leaves):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    weight = tuple(name for name in names if not name.isdigit())
    groups[weight, x.shape[-2:], jax.typeof(x).sharding.spec].append(index)
  results: list[Any] = [None] * len(leaves)
  for members in groups.values():
    arrays = tuple(leaves[index][1] for index in members)
    for index, result in zip(members, _orthogonalize_together(arrays, eps)):
      results[index] = result
  return jax.tree.unflatten(structure, results)


def _orthogonalize_together(arrays: tuple[jax.Array, ...], eps: float) -> tuple[jax.Array, ...]:
  """Orthogonalises arrays [..., D, E] of equal D, E and sharding.

  On a mesh that splits the matrices, all-to-alls first give each device whole matrices, so that the
  iterations need no collectives: 3 products in each of them would be summed over the mesh
  otherwise. As many as the devices do not divide are filled up with zeros, and a matrix that no
  axis splits is computed where it is.
  """
  spec = jax.typeof(arrays[0]).sharding.spec
  entries = (*spec, *(None,) * (arrays[0].ndim - len(spec)))
  rows, columns = (_axes(entry) if is_sharded() else () for entry in entries[-2:])
  parts = math.prod(mesh_shape()[axis] for axis in (*rows, *columns))

  def on_device(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    stacks = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    ends = list(itertools.accumulate(map(len, stacks)))
    x_LDE = jnp.pad(jnp.concatenate(stacks), ((0, -ends[-1] % parts), (0, 0), (0, 0)))
    for axis, names in ((1, rows), (2, columns)):
      if names:
        x_LDE = jax.lax.all_to_all(x_LDE, names, split_axis=0, concat_axis=axis, tiled=True)
    x_LDE = newton_schulz(x_LDE, eps)
    for axis, names in ((2, columns), (1, rows)):
      if names:
        x_LDE = jax.lax.all_to_all(x_LDE, names, split_axis=axis, concat_axis=0, tiled=True)
    return tuple(y.reshape(x.shape) for x, y in zip(arrays, jnp.split(x_LDE, ends)))

  if is_sharded():
    on_device = jax.shard_map(on_device, in_specs=spec, out_specs=spec)
  return on_device(arrays)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes that one entry of a PartitionSpec names."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else entry


@functools.partial(jax.jit, static_argnames="eps")
def newton_schulz(x_LDE: jax.Array, eps: float) -> jax.Array:
  """Returns each matrix with its singular values moved to about 0.7 to 1.2 (Jordan 2024).

  Five iterations of a polynomial of odd degree 5 in the matrix divided by its Frobenius norm + eps.
  They are a loop, and the function a cached one, because a model has many shapes to compile it for.
  """
  if x_LDE.shape[1] > x_LDE.shape[2]:  # the products are smaller the other way round
    return newton_schulz(x_LDE.swapaxes(1, 2), eps).swapaxes(1, 2)
  a, b, c = _COEFFICIENTS

  def iterate(_: Any, x_LDE: jax.Array) -> jax.Array:
    gram_LDD = jnp.einsum("lde,lfe->ldf", x_LDE, x_LDE)
    step_LDD = b * gram_LDD + c * jnp.einsum("lde,lef->ldf", gram_LDD, gram_LDD)
    return a * x_LDE + jnp.einsum("ldf,lfe->lde", step_LDD, x_LDE)

  norm_L11 = jnp.sqrt(jnp.sum(jnp.square(x_LDE), axis=(1, 2), keepdims=True))
  return jax.lax.fori_loop(0, _ITERATIONS, iterate, x_LDE / (norm_L11 + eps))
