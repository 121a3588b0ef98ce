"""Looks up rows of the token embedding, a table [V, D], no device holding all of it."""

# B batch, T positions, D model, V vocabulary, E parts that D is split into on a mesh

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig
from jaxlm.models.linear import Roles, sharded_normal
from pallas_kernels.common.shards import Axes, run_on_shards, sharded_axes, vary_together
from sharding.rules import is_manual, is_sharded, manual_axes, shard, spec


class Embedding(nn.Module):
  """Owns the table [V, D] and looks up its rows in the compute type."""

  V: int
  D: int
  compute: ComputeConfig

  def setup(self) -> None:
    """Declares the table."""
    shape, std = (self.V, self.D), self.D**-0.5
    self.weight = self.param("weight", sharded_normal, shape, std, "vocab", "embed")

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return {"weight": "embedding"}

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Returns the rows of these ids, [B, T, D] in the compute type."""
    dtype, reduce_dtype = self.compute.dtype, self.compute.reduce_dtype
    return lookup(self.weight, ids_BT, jnp.dtype(dtype), jnp.dtype(reduce_dtype))


def lookup(
  w_VD: jax.Array, ids_BT: jax.Array, dtype: jnp.dtype, reduce_dtype: jnp.dtype
) -> jax.Array:
  """Returns rows of the table, [B, T, D] in `dtype`; gradients add up in the table's own type.

  An id outside [0, V) has a row of NaN, which the loss shows.

  On a mesh the table stays where it is. Each device looks up its part of D, of the rows that it
  holds, for the tokens of all devices that share D; the rows are summed over the parts of V, and
  each device gets D of its own tokens together by an all-to-all in `dtype`. Its transpose sends the
  rows' gradients, unsummed, in the narrower of `dtype` and `reduce_dtype`.
  """
  if is_manual():
    held = {"vocab_axes": manual_axes("vocab"), "width_axes": ()}
    return _lookup_shard(w_VD, ids_BT, dtype=dtype, reduce_dtype=reduce_dtype, **held)
  if not is_sharded():
    at = jnp.asarray(w_VD).at[ids_BT]
    return at.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(dtype)
  ids_BT = shard(ids_BT, "batch", "length")
  rows_axes, length_axes = sharded_axes(ids_BT, 0), sharded_axes(ids_BT, 1)
  # where one position is not spread over the sequence's axes, D is gathered over these
  width_axes = tuple(a for a in sharded_axes(w_VD, 1) if a in rows_axes + length_axes)
  vocab_axes = sharded_axes(w_VD, 0)
  local = functools.partial(
    _lookup_shard,
    vocab_axes=vocab_axes,
    width_axes=width_axes,
    dtype=dtype,
    reduce_dtype=reduce_dtype,
  )
  layouts = (vocab_axes, width_axes), (rows_axes, length_axes)
  out = spec((*ids_BT.shape, w_VD.shape[1]), "batch", "norm_length", None)
  return run_on_shards(local, (w_VD, ids_BT), layouts, out)


def _lookup_shard(
  w_VD: jax.Array,
  ids_BT: jax.Array,
  *,
  vocab_axes: Axes,
  width_axes: Axes,
  dtype: jnp.dtype,
  reduce_dtype: jnp.dtype,
) -> jax.Array:
  """Does one device's part of `lookup`; V, D, B and T are those of its shards."""
  w_VD, ids_BT = vary_together(w_VD, ids_BT)
  ids_EBT = jax.lax.all_gather(ids_BT, width_axes) if width_axes else ids_BT[None]
  held = w_VD.shape[0]
  vocabulary = held * jax.lax.axis_size(vocab_axes) if vocab_axes else held
  is_known_EBT = (ids_EBT >= 0) & (ids_EBT < vocabulary)
  if vocab_axes:
    ids_EBT = ids_EBT - jax.lax.axis_index(vocab_axes) * held
  is_held_EBT = (ids_EBT >= 0) & (ids_EBT < held)
  rows_EBTD = w_VD[jnp.where(is_held_EBT, ids_EBT, 0)]
  absent_EBT = jnp.where(is_known_EBT, 0.0, jnp.nan)  # 0: another device holds the row
  rows_EBTD = jnp.where(is_held_EBT[..., None], rows_EBTD, absent_EBT[..., None]).astype(dtype)
  if vocab_axes and rows_EBTD.shape[2] == 1:  # a decoding step, whose one position stays whole
    rows_EBTD = jax.lax.psum(rows_EBTD, vocab_axes)
  elif vocab_axes:
    rows_EBTD = jax.lax.psum_scatter(rows_EBTD, vocab_axes, scatter_dimension=2, tiled=True)
  if not width_axes:
    return rows_EBTD[0]
  parts_EBTD = _exchange(rows_EBTD, width_axes, reduce_dtype)
  parts_BTED = jnp.moveaxis(parts_EBTD, 0, 2)
  return parts_BTED.reshape(*parts_BTED.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exchange(rows_EBTD: jax.Array, axes: Axes, reduce_dtype: jnp.dtype) -> jax.Array:
  """Sends entry e of the leading axis to device e of `axes`; returns what the others sent."""
  return jax.lax.all_to_all(rows_EBTD, axes, split_axis=0, concat_axis=0, tiled=True)


def _exchange_forward(
  rows_EBTD: jax.Array, axes: Axes, reduce_dtype: jnp.dtype
) -> tuple[jax.Array, None]:
  return _exchange(rows_EBTD, axes, reduce_dtype), None


def _exchange_backward(
  axes: Axes, reduce_dtype: jnp.dtype, _: None, drows_EBTD: jax.Array
) -> tuple[jax.Array]:
  dtype = drows_EBTD.dtype
  narrower = min(dtype, reduce_dtype, key=lambda dtype: dtype.itemsize)
  return (_exchange(drows_EBTD.astype(narrower), axes, reduce_dtype).astype(dtype),)


_exchange.defvjp(_exchange_forward, _exchange_backward)
