"""Trains nested precisions at once: a sum of the losses of slices of the same int8 codes.

Nair et al. 2025, Matryoshka Quantization, arXiv 2502.06786.
"""

# B batch, T positions, D model, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config.nested import NestedConfig
from jaxlm.models.head import Head
from jaxlm.models.matmul import matmul
from jaxlm.objectives.weighted import Weighted
from pallas_kernels.attention.mask import soft_cap
from pallas_kernels.common.checks import check_shape

Output = tuple[jax.Array, Head]
"""(states [B, T, D], the head that multiplies them)"""
Terms = dict[str, Weighted]


def nested_loss(
  nested: NestedConfig,
  predict: Callable[[int], Output],
  text_loss: Callable[[jax.Array, Head], Terms],
  weights_BT: jax.Array,
) -> Terms:
  """Returns the terms of training widths r together: "loss" is sum_r weight_r L_r.

  `predict(r)` runs the model on the top r bits and `text_loss` is the loss of its output on the
  text. L_r is that loss, and where r is distilled by a share, (1 - share) times it plus share times
  the cross-entropy to the output of the widest, which gets no gradient from there. Each L_r is a
  metric "loss_intR" on the text, and "distilled_intR". What has the weight 0 is not computed,
  unless it teaches.
  """
  shares = dict(zip(nested.bits, nested.distilled or (0.0,) * len(nested.bits)))
  weights = {r: weight for r, weight in zip(nested.bits, nested.weights) if weight}
  widest = max(nested.bits)
  teaches = any(shares[r] for r in weights)
  outputs = {r: predict(r) for r in nested.bits if r in weights or (teaches and r == widest)}
  metrics: Terms = {}
  total, tokens = jnp.float32(0), jnp.float32(0)
  for r, weight in weights.items():
    terms = text_loss(*outputs[r])
    tokens = terms["loss"].den
    minimised = sum((t.weight * t.num for t in terms.values()), start=jnp.float32(0))
    metrics[f"loss_int{r}"] = Weighted(terms["loss"].num, tokens, weight=0.0)
    if shares[r]:
      distilled = distillation_loss(outputs[r], outputs[widest], weights_BT)
      minimised = (1 - shares[r]) * minimised + shares[r] * distilled.num
      metrics[f"distilled_int{r}"] = Weighted(distilled.num, distilled.den, weight=0.0)
    total += weight * minimised
  return {"loss": Weighted(total, tokens)} | metrics


def distillation_loss(student: Output, teacher: Output, weights_BT: jax.Array) -> Weighted:
  """Returns the cross-entropy of the student's next token to the teacher's, in nats per token.

  The teacher gets no gradient. Holds all logits of both, float32 [B, T, V].
  """
  check_shape("weights_BT", weights_BT, student[0].shape[:2])
  logprobs_BTV = jax.nn.log_softmax(_logits(*student))
  teacher_BTV = jax.nn.softmax(jax.lax.stop_gradient(_logits(*teacher)))
  loss_BT = -jnp.sum(teacher_BTV * logprobs_BTV, axis=-1)
  return Weighted(jnp.sum(weights_BT * loss_BT), jnp.sum(weights_BT))


def _logits(states_BTD: jax.Array, head: Head) -> jax.Array:
  w_DV: Any = head.weight.T if head.layout == "vd" else head.weight
  out = ("batch", "length", "act_vocab")
  logits_BTV = matmul(states_BTD, w_DV, (None, "vocab"), out, "float32")
  return soft_cap(logits_BTV, head.cap)
