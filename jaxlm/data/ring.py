"""Puts the rows of a batch into the order in which a ring of devices shares the work evenly."""

# B batch, T positions of a row

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.data.packing import Batch
from sharding.context.order import Order, permutation, permute, ring_size


def in_ring_order(batch: Batch) -> tuple[Batch, Order]:
  """Returns the batch with its columns in the order of the current mesh's ring, and that order.

  Each input keeps its target, weight, segment and position. Rows of single segments get positions,
  [1, T]. Columns are moved on each device, without communication: a batch lies over the mesh by
  rows alone. Without a ring the batch stays as it is. Raises UserError where 2 context_ring does
  not divide T.
  """
  ring, T = ring_size(), batch.inputs_BT.shape[1]
  if ring == 1:
    return batch, "contiguous"
  batch = jax.tree.map(lambda x_BT: permute(x_BT, "zigzag", ring), batch)
  if batch.positions_BT is None:
    batch = batch._replace(positions_BT=jnp.asarray(permutation("zigzag", T, ring))[None])
  return batch, "zigzag"
