"""Orthogonalises the momentum of stacked matrices, each on one device: the Muon optimizer."""

# L stacked matrices (layers, experts), D rows, E columns

from __future__ import annotations

import functools
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

    def direction(m: jax.Array, g: jax.Array) -> jax.Array:
      nesterov = beta * m / next_unbiased + (1 - beta) * g / unbiased
      return scale * math.sqrt(max(m.shape[-2:])) * orthogonalize(nesterov, eps)

    return jax.tree.map(direction, momentum, grads), MuonState(count, momentum)

  return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, eps: float) -> jax.Array:
  """Returns the matrices [..., D, E] with singular values moved close to 1, sharded as before.

  On a mesh that splits the matrices, all-to-alls first give each device whole matrices of the
  stack, so that the iterations need no collectives: 3 products in each of them would be summed over
  the mesh otherwise. A stack that the devices do not divide is filled up with zeros, and a matrix
  that no axis splits is computed where it is.
  """
  if not is_sharded():
    return newton_schulz(x.reshape(-1, *x.shape[-2:]), eps).reshape(x.shape)
  spec = jax.typeof(x).sharding.spec
  entries = (*spec, *(None,) * (x.ndim - len(spec)))
  rows, columns = _axes(entries[-2]), _axes(entries[-1])
  parts = math.prod(mesh_shape()[axis] for axis in (*rows, *columns))

  def on_device(x: jax.Array) -> jax.Array:
    x_LDE = x.reshape(-1, *x.shape[-2:])
    stack = len(x_LDE)
    x_LDE = jnp.pad(x_LDE, ((0, -stack % parts), (0, 0), (0, 0)))
    for axis, names in ((1, rows), (2, columns)):
      if names:
        x_LDE = jax.lax.all_to_all(x_LDE, names, split_axis=0, concat_axis=axis, tiled=True)
    x_LDE = newton_schulz(x_LDE, eps)
    for axis, names in ((2, columns), (1, rows)):
      if names:
        x_LDE = jax.lax.all_to_all(x_LDE, names, split_axis=axis, concat_axis=0, tiled=True)
    return x_LDE[:stack].reshape(x.shape)

  return jax.shard_map(on_device, in_specs=spec, out_specs=spec)(x)


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
