"""Computes updates; parameters are treated by their declared role.

A rule gives a direction, and `update` moves the parameters:
p -= rate * (direction + weight_decay * p), the decay for "matrix" and "head" alone.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxlm.config import OptimizerConfig, check
from jaxlm.train.adam8bit import scale_by_adam8bit
from jaxlm.train.muon import scale_by_muon
from sharding.rules import is_sharded

DECAYED = ("matrix", "head", "decayed_scale")
"""roles that weight decay acts on"""
_OWN_AXES = {
  "embedding": 2,
  "matrix": 2,
  "head": 2,
  "norm": 1,
  "bias": 1,
  "taps": 2,
  "scale": 1,
  "decayed_scale": 1,
}
"""axes of one parameter of a role; axes before these stack layers or experts"""


def make_optimizer(config: OptimizerConfig, roles: Any) -> optax.GradientTransformation:
  """Returns the rule that turns a gradient into a direction, for parameters of these `roles`.

  AdamW (Loshchilov and Hutter 2019), also with moments in 8 bits (`jaxlm.train.adam8bit`), Muon for
  "matrix" and adam for the rest (Jordan 2024; scaled to `muon_scale` root mean square as Liu et al.
  2025, arXiv 2502.16982, equation 4), Adafactor (Shazeer and Stern 2018), clipped per matrix.
  UserError where muon or the decay act on nothing.
  """
  present = set(jax.tree.leaves(roles))
  if config.weight_decay > 0:
    rule = f"decays {' and '.join(DECAYED)}, but the roles are {sorted(present)}; state 0"
    check(not present.isdisjoint(DECAYED), "optimizer.weight_decay", config.weight_decay, rule)
  if config.name == "adamw":
    return _on_mesh(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if config.name == "adam8bit":
    return scale_by_adam8bit(config.b1, config.b2, config.eps, roles)
  if config.name == "adafactor":
    clipped = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return _on_mesh(_for_each_parameter(clipped, roles))
  check("matrix" in present, "optimizer.name", "muon", f"needs a matrix; roles: {sorted(present)}")
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps, nesterov=True)
  rules = {
    "matrix": scale_by_muon(config.momentum, config.eps, config.muon_scale),
    "other": _on_mesh(adam),
  }
  return optax.partition(
    rules, jax.tree.map(lambda role: role if role == "matrix" else "other", roles)
  )


def _on_mesh(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a rule of optax, which names no shardings, with the compiler choosing them inside."""

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if not is_sharded():
      return rule.update(grads, state, params)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
    return jax.sharding.auto_axes(rule.update, out_sharding=shardings)(grads, state, params)

  return optax.GradientTransformation(rule.init, update)


def _for_each_parameter(rule: optax.GradientTransformation, roles: Any) -> Any:
  """Returns `rule` applied to each parameter by itself; stacked ones are as many parameters."""

  def stacked(function: Any, role: str, w: jax.Array) -> Any:
    for _ in range(w.ndim - _OWN_AXES.get(role, w.ndim)):
      function = jax.vmap(function)
    return function

  def init(params: Any) -> Any:
    return jax.tree.map(lambda role, w: stacked(rule.init, role, w)(w), roles, params)

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    both = jax.tree.map(
      lambda role, g, s, w: stacked(rule.update, role, g)(g, s, w), roles, grads, state, params
    )
    directions = jax.tree.map(lambda _, pair: pair[0], roles, both)
    return directions, jax.tree.map(lambda _, pair: pair[1], roles, both)

  return optax.GradientTransformation(init, update)


def update(
  optimizer: optax.GradientTransformation,
  roles: Any,
  grads: Any,
  opt_state: Any,
  params: Any,
  rate: jax.Array,
  weight_decay: jax.Array,
) -> tuple[Any, Any]:
  """Returns (new parameters, new optimizer state), sharded as before."""
  directions, opt_state = optimizer.update(grads, opt_state, params)

  def move(role: str, p: jax.Array, direction: jax.Array) -> jax.Array:
    decayed = weight_decay * p + direction if role in DECAYED else direction
    return (p - rate * decayed).astype(p.dtype)

  return jax.tree.map(move, roles, params, directions), opt_state
