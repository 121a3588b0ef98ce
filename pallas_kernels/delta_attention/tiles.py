"""Computes one chunk of one head from tiles in a TPU's vector memory; differentiable there.

What `chunk.py` does, in the form that a matrix unit likes: only two-dimensional arrays, blocks of
positions told apart by masks, the state transposed so that a decay scales its lanes.
"""

# C positions of a chunk, K width of keys, V width of values, L halvings of the chunk
from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_attention.chunk import halvings
from pallas_kernels.delta_attention.terms import Gated


class Tables(NamedTuple):
  """Holds constants of a chunk; kernels read them, since they may not capture arrays."""

  sums: Any  # [L + 2, C, C] of 0 and 1: sums of log decays, see `chunk.halvings`
  level_CC: Any  # int32: which halving parts i > j; L on the diagonal, -1 above it


def make_tables(C: int, dtype: Any) -> Tables:
  """Returns the constants for chunks of C positions."""
  sums, masks = halvings(C)
  level_CC = np.full((C, C), -1, np.int32)
  for level, mask_CC in enumerate(masks):
    level_CC[mask_CC] = level
  np.fill_diagonal(level_CC, len(masks))
  return Tables(jnp.asarray(sums, dtype), jnp.asarray(level_CC))


def attend_to_chunks(
  heads: list[Gated], states_VK: list[jax.Array], tables: Tables, dtype: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns the outputs [C, V] of a chunk of several heads and the states after it, transposed.

  Operands of products are `dtype`; all else is float32. The heads' operations alternate, since a
  compiler hides the latency of one product behind its neighbours in the program.
  """
  steps = [_steps(*head, tables, dtype) for head in zip(heads, states_VK)]
  results = _alternate(steps)
  return [o_CV for o_CV, _ in results], [state_VK for _, state_VK in results]


def _alternate(steps: list[Generator[None, None, Any]]) -> list[Any]:
  """Runs generators in turn, up to the next `yield` of each; returns what they return."""
  results: list[Any] = [None] * len(steps)
  running = dict(enumerate(steps))
  while running:
    for i, step in list(running.items()):
      try:
        next(step)
      except StopIteration as stop:
        results[i] = stop.value
        del running[i]
  return results


def _steps(
  gated: Gated, state_VK: jax.Array, tables: Tables, dtype: Any
) -> Generator[None, None, tuple[jax.Array, jax.Array]]:
  """Returns one head's output and state; yields where another head may go on."""
  q_CK, k_CK, erased_CK, v_CV, decay_CK = gated
  decays: list[Any] = [1.0] * len(tables.sums)
  total_1K: Any = 1.0
  if decay_CK is not None:
    decays = []
    for table_CC in tables.sums:
      decays.append(jnp.exp(_sum_decays(table_CC, decay_CK, dtype)))
      yield
    total_1K = jnp.exp(jnp.sum(decay_CK, axis=0, keepdims=True))
  *factors, from_start_CK, to_end_CK = decays
  level_CC = tables.level_CC
  # P_ij = q_i . (decay_ij k_j) for j <= i, A_ij = (b k)_i . (decay_ij k_j) for j < i
  diagonal_C1 = jnp.sum(q_CK * k_CK, axis=1, keepdims=True)
  visible_CC = jnp.where(level_CC == len(factors), diagonal_C1, 0.0)
  lower_CC = jnp.zeros_like(visible_CC)
  for level, factor_CK in enumerate(factors):
    here, decayed_CK = level_CC == level, k_CK * factor_CK
    if erased_CK is not None:
      product_CC = dot(erased_CK * factor_CK, decayed_CK, 1, 1, dtype)
      lower_CC = jnp.where(here, product_CC, lower_CC)
    product_CC = dot(q_CK * factor_CK, decayed_CK, 1, 1, dtype)
    visible_CC = jnp.where(here, product_CC, visible_CC)
    yield
  added_CV = v_CV
  if erased_CK is not None:
    read_CV = dot(erased_CK * from_start_CK, state_VK, 1, 1, dtype)
    inverse_CC = yield from _invert_unit_lower(lower_CC, level_CC, dtype)
    added_CV = solve_unit_lower(lower_CC, v_CV - read_CV, inverse_CC, level_CC, dtype)
    yield
  o_CV = dot(q_CK * from_start_CK, state_VK, 1, 1, dtype)
  o_CV = o_CV + dot(visible_CC, added_CV, 1, 0, dtype)
  yield
  return o_CV, total_1K * state_VK + dot(added_CV, k_CK * to_end_CK, 0, 0, dtype)


def _invert_unit_lower(
  lower_CC: jax.Array, level_CC: jax.Array, dtype: Any
) -> Generator[None, None, jax.Array]:
  """Returns (I + L)^-1 by joining the inverses of halves; not to be differentiated."""
  lower_CC = jax.lax.stop_gradient(lower_CC)
  levels = lower_CC.shape[0].bit_length() - 1
  inverse_CC = jnp.where(level_CC == levels, 1.0, jnp.where(level_CC == 0, -lower_CC, 0.0))
  for level in range(1, levels):
    joined_CC = jnp.where(level_CC == level, lower_CC, 0.0)
    product_CC = dot(inverse_CC, joined_CC, 1, 0, dtype)
    yield
    inverse_CC = inverse_CC - dot(product_CC, inverse_CC, 1, 0, dtype)
    yield
  return inverse_CC


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
  """Contracts one axis of each; operands `dtype`, also in the backward pass, sums float32."""
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(
    a.astype(dtype), b.astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32
  )


def _dot_forward(a, b, contract_a: int, contract_b: int, dtype: Any):
  return dot(a, b, contract_a, contract_b, dtype), (a.astype(dtype), b.astype(dtype))


def _dot_backward(contract_a: int, contract_b: int, dtype: Any, residuals, dc: jax.Array):
  a, b = residuals
  if contract_a == 1:
    da = dot(dc, b, 1, 1 - contract_b, dtype)
  else:
    da = dot(b, dc, 1 - contract_b, 1, dtype)
  if contract_b == 0:
    return da, dot(a, dc, 1 - contract_a, 0, dtype)
  return da, dot(dc, a, 0, 1 - contract_a, dtype)


dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_decays(table_CC: jax.Array, decay_CK: jax.Array, dtype: Any) -> jax.Array:
  """Returns sums of log decays, with 16 bits of each where operands of products are bfloat16."""
  if dtype == jnp.float32:
    return dot(table_CC, decay_CK, 1, 0, dtype)
  high_CK = decay_CK.astype(dtype)
  low_CK = decay_CK - high_CK.astype(jnp.float32)
  return dot(table_CC, high_CK, 1, 0, dtype) + dot(table_CC, low_CK, 1, 0, dtype)


def _sum_decays_forward(table_CC, decay_CK, dtype: Any):
  return _sum_decays(table_CC, decay_CK, dtype), table_CC


def _sum_decays_backward(dtype: Any, table_CC, dsum_CK):
  return jnp.zeros_like(table_CC), dot(table_CC, dsum_CK, 0, 0, dtype)


_sum_decays.defvjp(_sum_decays_forward, _sum_decays_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def solve_unit_lower(
  lower_CC: jax.Array, right_CV: jax.Array, inverse_CC: jax.Array, level_CC: jax.Array, dtype: Any
) -> jax.Array:
  """Returns (I + L)^-1 R for L below the diagonal, from the inverse; no gradient flows to that."""
  return _solve_forward(lower_CC, right_CV, inverse_CC, level_CC, dtype)[0]


def _solve_forward(lower_CC, right_CV, inverse_CC, level_CC, dtype: Any):
  x_CV = dot(inverse_CC, right_CV, 1, 0, dtype)
  return x_CV, (inverse_CC, x_CV, level_CC)


def _solve_backward(dtype: Any, residuals, dx_CV: jax.Array):
  inverse_CC, x_CV, level_CC = residuals
  dright_CV = dot(inverse_CC, dx_CV, 0, 0, dtype)
  levels = inverse_CC.shape[0].bit_length() - 1
  below = (level_CC >= 0) & (level_CC < levels)
  dlower_CC = jnp.where(below, -dot(dright_CV, x_CV, 1, 1, dtype), 0.0)
  return dlower_CC, dright_CV, jnp.zeros_like(inverse_CC), None


solve_unit_lower.defvjp(_solve_forward, _solve_backward)
