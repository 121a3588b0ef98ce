"""Learning-rate schedules and update rules, all from optax, with decay masks for this project's parameter trees."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.config import OptimizerConfig, check
from sharding.rules import is_sharded


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Step (0-based) -> learning rate: linear warm-up to the peak, then the named shape until step `steps`.

  wsd is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395), with a linear decay.
  """
  peak, final = config.learning_rate, config.learning_rate * config.final
  warmup = config.warmup
  check(warmup < steps, "optimizer.warmup", warmup, f"must be below steps={steps}")
  after = steps - warmup
  cooling = min(max(1, round(config.decay * steps)), after)
  shapes = {
    "cosine": optax.cosine_decay_schedule(peak, after, alpha=config.final),
    "linear": optax.linear_schedule(peak, final, after),
    "constant": optax.constant_schedule(peak),
    "wsd": optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, final, cooling)],
      [after - cooling],
    ),
  }
  # the first step already moves: it uses 1 / (warmup + 1) of the peak
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, shapes[config.schedule]], [warmup])


def decay_mask(params: Any) -> Any:
  """True for matrices of the blocks and the head; False for norms, biases and the embedding."""
  return jax.tree_util.tree_map_with_path(
    lambda path, w: _is_matrix(path, w) and path[0].key != "embed", params
  )


def _is_matrix(path: tuple, w: jax.Array) -> bool:
  """Whether one layer's share of the parameter has two axes: those of the blocks are stacked on a leading one."""
  return w.ndim - _is_stacked(path) == 2


def _is_stacked(path: tuple) -> bool:
  return path[0].key == "stacks"


def _muon_axes(params: Any) -> Any:
  """Which axes of each block matrix [L, in, out] are orthogonalised together; None leaves a parameter to adamw."""

  def axes(path: tuple, w: jax.Array) -> MuonDimensionNumbers | None:
    return MuonDimensionNumbers(1, 2) if _is_stacked(path) and _is_matrix(path, w) else None

  return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The update rule with its schedule; clipping comes before it, in the step.

  AdamW (Loshchilov and Hutter 2019), Muon (Jordan 2024; scaled to `muon_scale` root mean square as Liu et al. 2025,
  arXiv 2502.16982, equation 4), Adafactor (Shazeer and Stern 2018).
  """
  rate = learning_rate_schedule(config, steps)
  if config.name == "adamw":
    rule = optax.adamw(
      rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
  elif config.name == "muon":
    rule = optax.chain(
      muon(
        rate,
        beta=config.momentum,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=config.muon_scale,
      ),
      # muon's own decay would spare the head, which it leaves to adamw
      optax.add_decayed_weights(lambda step: -config.weight_decay * rate(step), mask=decay_mask),
    )
  else:
    rule = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
      optax.scale_by_learning_rate(rate),
    )
  return rule


def update(
  optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
  """(new parameters, new optimizer state), sharded as before.

  Update rules come from a library that does not name shardings, so on a mesh the compiler chooses inside.
  """

  def apply(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  if not is_sharded():
    return apply(grads, opt_state, params)
  shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (params, opt_state))
  return jax.sharding.auto_axes(apply, out_sharding=shardings)(grads, opt_state, params)
