"""Next-token cross-entropy in nats, in float32 whatever the logits' dtype."""

# B batch, T positions, V vocabulary

import jax
import jax.numpy as jnp

from jaxlm.objectives.weighted import Weighted


def token_logprobs(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target, and the log of each softmax normaliser; both float32 [B, T].

  The target's logit is picked by comparison, which stays local when V is sharded.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  vocabulary_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
  picked_BT = jnp.sum(jnp.where(vocabulary_BTV == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
  return picked_BT - lse_BT, lse_BT


def next_token_loss(
  logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0
) -> tuple[Weighted, Weighted]:
  """(what to minimise, plain cross-entropy), over positions with these weights.

  The first adds `z_loss` times the squared log-normaliser (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
  """
  lp_BT, lse_BT = token_logprobs(logits_BTV, targets_BT)
  cross_entropy = Weighted(-jnp.sum(weights_BT * lp_BT), jnp.sum(weights_BT))
  penalty = z_loss * jnp.sum(weights_BT * jnp.square(lse_BT)) if z_loss else 0.0
  return Weighted(cross_entropy.num + penalty, cross_entropy.den), cross_entropy
