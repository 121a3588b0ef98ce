"""The token embedding: a table [V, D] whose rows are looked up."""

# B batch, T positions, D model, V vocabulary

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models.linear import Roles, sharded_normal
from sharding.rules import all_gather, is_sharded, out_sharding, shard


class Embedding(nn.Module):
  """Owns the table [V, D] and looks up its rows in the compute type."""

  V: int
  D: int
  dtype: str

  def setup(self) -> None:
    self.weight = self.param(
      "weight", sharded_normal, (self.V, self.D), self.D**-0.5, "vocab", "embed"
    )

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return {"weight": "embedding"}

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Returns the rows of these ids, [B, T, D] in the compute type."""
    return lookup(self.weight, ids_BT).astype(jnp.dtype(self.dtype))


def lookup(w_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """Returns rows of the table; on a mesh each device looks up its own part of T in all of it."""
  if not is_sharded():
    return w_VD[ids_BT]
  ids_BT = shard(ids_BT, "batch", "norm_length")
  shape = (*ids_BT.shape, w_VD.shape[1])
  table_VD = all_gather(w_VD, None, None)
  return table_VD.at[ids_BT].get(out_sharding=out_sharding(shape, "batch", "norm_length", None))
