"""Computes next-token cross-entropy in nats, in float32, without all logits in memory."""

# B batch, T positions, N = B T tokens, D model

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.models.head import Head
from jaxlm.objectives.weighted import Weighted
from pallas_kernels.common.checks import check_dtype, check_shape
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from sharding.rules import is_sharded, manual_axes

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]


def token_logprobs(
  states_BTD: jax.Array, head: Head, targets_BT: jax.Array, implementation: Implementation = "auto"
) -> tuple[jax.Array, jax.Array]:
  """Returns (log-probability of each target, log of each softmax normaliser), in nats.

  Both are float32 [B, T] and differentiable. `states_BTD`: what the head multiplies
  (`Transformer.apply(..., logits=False)`). `implementation`: as in TrainConfig. Raises UserError
  where shapes or dtypes do not fit.
  """
  _check_tokens(states_BTD, targets_BT)
  loss_N, lse_N = _cross_entropy(
    states_BTD, head, targets_BT, implementation, reduction="none", return_lse=True
  )
  return -_split_tokens(loss_N, states_BTD), _split_tokens(lse_N, states_BTD)


def next_token_loss(
  states_BTD: jax.Array,
  head: Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  z_loss: float = 0.0,
  implementation: Implementation = "auto",
) -> dict[str, Weighted]:
  """Returns the terms of next-token prediction, over positions with these weights.

  "loss" is the cross-entropy. With `z_loss` it is only a metric, and "loss_with_z" is minimised in
  its place, which adds `z_loss` times the squared log-normaliser (Chowdhery et al. 2022, arXiv
  2204.02311, section 5). Other arguments as in `token_logprobs`. Where a weight is 0, neither state
  nor target matter.
  """
  _check_tokens(states_BTD, targets_BT)
  check_shape("weights_BT", weights_BT, targets_BT.shape)
  weights_N = merge_tokens(_spread_like(states_BTD, weights_BT))
  minimised, lse_N = _cross_entropy(
    states_BTD,
    head,
    targets_BT,
    implementation,
    reduction="sum",
    weights_N=weights_N,
    z_loss=z_loss,
    return_lse=True,
  )
  tokens = jnp.sum(weights_N)
  if not z_loss:
    return {"loss": Weighted(minimised, tokens)}
  square_N = jnp.where(weights_N != 0, jnp.square(jax.lax.stop_gradient(lse_N)), 0.0)
  plain = minimised - z_loss * jnp.sum(weights_N * square_N)
  return {
    "loss": Weighted(plain, tokens, weight=0.0),
    "loss_with_z": Weighted(minimised, tokens),
  }


def _check_tokens(states_BTD: jax.Array, targets_BT: jax.Array) -> None:
  """Refuses what merging [B, T] to [N] would hide, such as targets [T, B]."""
  check_shape("states_BTD", states_BTD, (None, None, None))
  check_dtype("states_BTD", states_BTD, jnp.floating)
  check_shape("targets_BT", targets_BT, states_BTD.shape[:2])
  check_dtype("targets_BT", targets_BT, jnp.integer)


def _cross_entropy(
  states_BTD: jax.Array,
  head: Head,
  targets_BT: jax.Array,
  implementation: Implementation,
  **options,
) -> tuple[jax.Array, jax.Array]:
  return linear_cross_entropy(
    merge_tokens(states_BTD),
    head.weight,
    merge_tokens(_spread_like(states_BTD, targets_BT)),
    classifier_layout=head.layout,
    softcap=head.cap,
    implementation=None if implementation == "auto" else implementation,
    axis_name=manual_axes("act_vocab") or None,
    **options,
  )


def merge_tokens(x: jax.Array) -> jax.Array:
  """Returns [B, T, ...] as [N, ...]; on a mesh N is split by all axes that B and T are split by.

  Where T is split, each device merges its own tokens, so that none is sent: N is then not in the
  order of the rows.
  """
  shape = (x.shape[0] * x.shape[1], *x.shape[2:])
  if not is_sharded():
    return jnp.reshape(x, shape)
  now = jax.typeof(x).sharding.spec
  merged = P(_token_axes(now) or None, *now.partitions[2:], reduced=now.reduced)
  if now.partitions[1] is None:
    return jax.lax.reshape(x, shape, out_sharding=merged)

  def merge(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])

  return jax.shard_map(merge, in_specs=now, out_specs=merged)(x)


def _split_tokens(x_N: jax.Array, states_BTD: jax.Array) -> jax.Array:
  """Returns what `merge_tokens` merged, [B, T], spread like the states."""
  shape = states_BTD.shape[:2]
  if not is_sharded():
    return jnp.reshape(x_N, shape)
  partitions = P(*jax.typeof(states_BTD).sharding.spec.partitions[:2])
  if partitions[1] is None:
    return jax.lax.reshape(x_N, shape, out_sharding=partitions)
  B = jax.typeof(states_BTD).sharding.shard_shape(states_BTD.shape)[0]
  split = jax.shard_map(
    lambda x_N: x_N.reshape(B, -1), in_specs=P(_token_axes(partitions)), out_specs=partitions
  )
  return split(x_N)


def _spread_like(states_BTD: jax.Array, x_BT: jax.Array) -> jax.Array:
  """Returns [B, T] with the tokens on the devices that have their states."""
  if not is_sharded():
    return x_BT
  return jax.reshard(x_BT, P(*jax.typeof(states_BTD).sharding.spec.partitions[:2]))


def _token_axes(partitions: P) -> tuple[str, ...]:
  return tuple(jax.tree.leaves(tuple(partitions.partitions[:2])))
