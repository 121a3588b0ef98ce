"""Sums the gradients of a batch over micro-batches, exactly whatever each term is divided by."""

# M micro-batches, B batch

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P

from jaxlm.objectives.weighted import Weighted
from pallas_kernels.common.errors import UserError
from sharding.rules import defer_reduction, is_sharded, reduce_gradients, spec

Terms = dict[str, Weighted]
Objective = Callable[[Any, Any, jax.Array], Terms]


def accumulated_gradients(
  objective: Objective, params: Any, batch: Any, key: jax.Array, microbatches: int
) -> tuple[Any, Terms]:
  """Returns (gradient of what is minimised, its terms summed over the batch).

  `objective(params, batch, key)` returns named `Weighted` terms; micro-batch m gets its rows and
  fold_in(key, m). The denominators of the whole batch are computed first, without the parameters,
  so that each micro-batch's share of the gradient is known at once: one forward and backward pass,
  compiled once, with one micro-batch in memory. On a mesh each device keeps its own share of the
  sum, so that every gradient is reduced once per step.
  """
  deferred = defer_reduction(params)
  parts = jax.tree.map(lambda x: split_batch(x, microbatches), batch)
  keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
  first = jax.tree.map(lambda x: x[0], (parts, keys))
  objective = _traced(objective, deferred, *first)
  dens = denominators(objective, deferred, parts, keys)

  def minimised(params: Any, part: Any, key: jax.Array) -> tuple[jax.Array, Terms]:
    terms = objective(params, part, key)
    shares = [
      term.weight * Weighted(term.num, dens[name]).mean()
      for name, term in terms.items()
      if term.weight
    ]
    return sum(shares, start=jnp.float32(0)), terms

  gradient = jax.grad(minimised, has_aux=True)
  if microbatches == 1:
    grads, terms = gradient(deferred, *first)
  else:

    def add_to(grads: Any, part_and_key: tuple[Any, jax.Array]) -> tuple[Any, Terms]:
      more, terms = gradient(deferred, *part_and_key)
      return jax.tree.map(jnp.add, grads, more), terms

    grads, terms_M = jax.lax.scan(add_to, jax.tree.map(_zero_gradient, deferred), (parts, keys))
    terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms_M)
  return reduce_gradients(grads, params), terms


def _traced(objective: Objective, params: Any, part: Any, key: jax.Array) -> Objective:
  """Returns the objective's program for arguments like these, to be used without tracing it again.

  Raises UserError for terms that cannot be accumulated.
  """

  def checked(params: Any, part: Any, key: jax.Array) -> Terms:
    terms = objective(params, part, key)
    _check_terms(terms)
    return terms

  closed, terms = jax.make_jaxpr(checked, return_shape=True)(params, part, key)
  program, structure = jaxpr_as_fun(closed), jax.tree.structure(terms)
  return lambda *arguments: jax.tree.unflatten(structure, program(*jax.tree.leaves(arguments)))


def denominators(
  objective: Objective, params: Any, parts: Any, keys: jax.Array
) -> dict[str, jax.Array]:
  """Returns each term's denominator over all micro-batches, computed without the parameters.

  Traces the objective and drops from its program what the denominators do not need. Raises
  UserError for terms that cannot be accumulated.
  """

  def of_terms(params: Any, part: Any, key: jax.Array) -> dict[str, jax.Array]:
    terms = objective(params, part, key)
    _check_terms(terms)
    return {name: jnp.float32(term.den) for name, term in terms.items()}

  first = jax.tree.map(lambda x: x[0], (parts, keys))
  closed, names = jax.make_jaxpr(of_terms, return_shape=True)(params, *first)
  jaxpr = _without_unneeded_effects(closed.jaxpr)
  trained = len(jax.tree.leaves(params))
  for index, name in enumerate(sorted(names)):
    _, used = dce_jaxpr(jaxpr, [i == index for i in range(len(names))])
    if any(used[:trained]):
      raise UserError(
        f"term {name!r}: its denominator depends on the parameters; it must follow from the batch, "
        "the key and the model state alone, so that micro-batches can be added exactly"
      )
  jaxpr, used = dce_jaxpr(jaxpr, [True] * len(names))
  program = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))

  def of_micro_batch(part_and_key: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(part_and_key)
    return program(*(x for x, is_used in zip(leaves, used[trained:], strict=True) if is_used))

  dens_M = jax.lax.map(of_micro_batch, (parts, keys))
  return {name: jnp.sum(den_M) for name, den_M in zip(sorted(names), dens_M)}


def _check_terms(terms: Terms) -> None:
  """Raises UserError unless the terms are named, weighted sums of the right shapes."""
  if not isinstance(terms, dict) or "loss" not in terms:
    raise UserError(f"objective: must return a dict with a term 'loss', not {terms!r:.200}")
  for name, term in terms.items():
    if not isinstance(term, Weighted):
      raise UserError(f"term {name!r}: must be a Weighted, not {type(term).__name__}")
    if not isinstance(term.weight, int | float):
      raise UserError(f"term {name!r}: weight={term.weight!r} must be a plain number")
    if jnp.shape(term.den) or (term.weight and jnp.shape(term.num)):
      shapes = f"num {jnp.shape(term.num)}, den {jnp.shape(term.den)}"
      raise UserError(f"term {name!r}: {shapes} must be scalars (num where it has a weight)")


def _without_unneeded_effects(jaxpr: Jaxpr) -> Jaxpr:
  """Returns the program without equations, such as debug prints, that no output comes from."""
  needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
  eqns = []
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(v for v in eqn.invars if isinstance(v, Var))
      eqns.append(eqn)
  return jaxpr.replace(eqns=eqns[::-1])


def _zero_gradient(w: jax.Array) -> jax.Array:
  """Returns zeros of the type of `w`'s gradient: unreduced where `w` is typed reduced."""
  if not is_sharded():
    return jnp.zeros(w.shape, w.dtype)
  now = jax.typeof(w).sharding.spec
  return jnp.zeros(w.shape, w.dtype, out_sharding=P(*now.partitions, unreduced=now.reduced))


def split_batch(x: jax.Array, microbatches: int) -> jax.Array:
  """Returns [B, ...] as [M, B / M, ...].

  Micro-batch m takes every M-th row from m on, so that no row changes its device.
  """
  shape = (x.shape[0] // microbatches, microbatches, *x.shape[1:])
  if not is_sharded():
    return jnp.reshape(x, shape).swapaxes(0, 1)
  sharding = spec(shape, "batch", *[None] * x.ndim)
  return jax.lax.reshape(x, shape, out_sharding=sharding).swapaxes(0, 1)
