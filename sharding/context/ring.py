"""Attends while keys and values travel round a ring of devices, with a backward pass of its own.

Every rank meets the shard of one other rank per hop, while the next shard is on its way, and merges
softmax over the parts in float32. In causal attention a hop multiplies only what is visible: whole
shards or halves of them, which `order` makes equal work for all ranks. The backward pass keeps q,
k, v, output and logsumexp, and sends dk and dv round with k and v.

Source: Liu et al. 2023, arXiv 2310.01889; gradients as in Dao et al. 2022, arXiv 2205.14135.
"""

# B batch, T positions of a shard, S positions of the whole row, N query heads, K key heads,
# G = N / K, H width of queries and keys, U width of values, Z any width
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla
from pallas_kernels.attention.api import IMPLEMENTATIONS
from pallas_kernels.attention.checks import check_arrays, check_options
from pallas_kernels.common.checks import check, check_choice
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import log_once, platform
from pallas_kernels.common.shards import zeros_varying_like
from sharding.context.order import RING, check_length
from sharding.context.parts import (
  Part,
  Plan,
  Rows,
  Variant,
  attend_to_rows,
  choose_part,
  own_part,
  tokens_of_part,
  visible_parts,
)


class Queries(NamedTuple):
  """Holds what the backward pass knows of a rank's queries."""

  q_BKGTH: jax.Array
  do_BKGTU: jax.Array
  lse_BKGT1: jax.Array  # over all keys
  mean_BKGT1: jax.Array  # sum_U do o


def ring_attention_shard(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  rows: Rows,
  variant: Variant,
) -> jax.Array:
  """Returns attention of this device's shards, inside shard_map over `context_ring`.

  Rank r holds the tokens that the order gives it; segment ids and positions are those of whole rows
  in that order. Without positions all tokens stand where the order says. With them they alone
  decide what is visible, in any order, and no hop is cut short. A ring of one rank is plain
  attention.

  c - 1 hops of k and v on c ranks, and in the backward pass the same with c hops of dk and dv.
  Raises UnsupportedError for a named implementation other than "xla" on more than one rank.
  """
  ring, (B, T, N, H) = jax.lax.axis_size(RING), q_BTNH.shape
  check_arrays(q_BTNH, k_BTKH, v_BTKU)
  check_length(variant.order, T * ring, ring)
  rule = "positions only decide what is causal: leave them out with causal=False"
  check(variant.causal or rows.positions_BS is None, "causal", variant.causal, rule)
  if ring == 1:
    return attend_to_rows(q_BTNH, k_BTKH, v_BTKU, rows, variant)
  implementation = variant.implementation
  check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))
  if implementation not in (None, "xla"):
    reason = f"a ring of context_ring={ring} merges parts of softmax, which only 'xla' makes"
    raise UnsupportedError(f"implementation={implementation!r}: {reason}")
  log_once("ring attention", "xla", platform())
  K = k_BTKH.shape[2]
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  options = check_options(
    variant.causal, variant.window, variant.cap, variant.scale, H, interpret=False
  )
  plan = Plan(options, variant.order, RING)
  o_BKGTU = _attend(q_BKGTH, k_BTKH.swapaxes(1, 2), v_BTKU.swapaxes(1, 2), rows, plan)
  return o_BKGTU.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTU: jax.Array, rows: Rows, plan: Plan
) -> jax.Array:
  return _forward(q_BKGTH, k_BKTH, v_BKTU, rows, plan)[0]


def _forward(q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTU: jax.Array, rows: Rows, plan: Plan):
  """Returns the output [B, K, G, T, U], and what the backward pass needs."""
  ring, T = jax.lax.axis_size(plan.axis), k_BKTH.shape[2]
  parts = visible_parts(plan, T, given=rows.positions_BS is not None)

  def meet(state, keys_and_values, hop):
    """Returns the state after the shard that has travelled `hop` hops."""
    source = (jax.lax.axis_index(plan.axis) - hop) % ring
    branches = [functools.partial(_merge_part, part, q_BKGTH, rows, plan) for part in parts]
    case = choose_part(plan, T, source) if len(parts) > 1 else 0
    return jax.lax.switch(case, branches, state, *keys_and_values, source)

  own = own_part(plan, rows.positions_BS is not None)
  rank = jax.lax.axis_index(plan.axis)
  tokens = tokens_of_part(own, rows, plan, T, rank)
  state = xla.attend_to_part(q_BKGTH, k_BKTH, v_BKTU, tokens, own.options)
  travelling = _rotate((k_BKTH, v_BKTU), plan)

  def hop_on(carry, hop):
    state, travelling = carry
    ahead = _rotate(travelling, plan)
    return (meet(state, travelling, hop), ahead), None

  if ring > 2:
    (state, travelling), _ = jax.lax.scan(hop_on, (state, travelling), jnp.arange(1, ring - 1))
  o_BKGTU, lse_BKGT1 = meet(state, travelling, ring - 1)
  o_BKGTU = o_BKGTU.astype(v_BKTU.dtype)
  return o_BKGTU, (q_BKGTH, k_BKTH, v_BKTU, rows, o_BKGTU, lse_BKGT1)


def _backward(plan: Plan, residuals, do_BKGTU: jax.Array):
  """Returns dq, dk and dv of this rank's own tokens."""
  q_BKGTH, k_BKTH, v_BKTU, rows, o_BKGTU, lse_BKGT1 = residuals
  ring, T = jax.lax.axis_size(plan.axis), k_BKTH.shape[2]
  parts = visible_parts(plan, T, given=rows.positions_BS is not None)
  do_BKGTU = do_BKGTU.astype(lse_BKGT1.dtype)
  mean_BKGT1 = xla.mean_of_gradient(do_BKGTU, o_BKGTU)
  queries = Queries(q_BKGTH, do_BKGTU, lse_BKGT1, mean_BKGT1)

  def meet(dq_BKGTH, keys_and_values, hop):
    """Returns dq with the share of the shard that has travelled `hop` hops, and its dk and dv."""
    source = (jax.lax.axis_index(plan.axis) - hop) % ring
    branches = [functools.partial(_pull_part, part, queries, rows, plan) for part in parts]
    case = choose_part(plan, T, source) if len(parts) > 1 else 0
    return jax.lax.switch(case, branches, dq_BKGTH, *keys_and_values, source)

  own = own_part(plan, rows.positions_BS is not None)
  tokens = tokens_of_part(own, rows, plan, T, jax.lax.axis_index(plan.axis))
  dq_BKGTH, *own_sums = xla.gradients_of_part(*queries, k_BKTH, v_BKTU, tokens, own.options)
  sums = tuple(own_sums)
  travelling = _rotate((k_BKTH, v_BKTU), plan)

  def hop_on(carry, hop):
    dq_BKGTH, sums, travelling = carry
    ahead = _rotate(travelling, plan)
    dq_BKGTH, shares = meet(dq_BKGTH, travelling, hop)
    # the sums arrive while the shares are computed
    sums = jax.tree.map(jnp.add, _rotate(sums, plan), shares)
    return (dq_BKGTH, sums, ahead), None

  if ring > 2:
    carry = (dq_BKGTH, sums, travelling)
    (dq_BKGTH, sums, travelling), _ = jax.lax.scan(hop_on, carry, jnp.arange(1, ring - 1))
  dq_BKGTH, shares = meet(dq_BKGTH, travelling, ring - 1)
  sums = jax.tree.map(jnp.add, _rotate(sums, plan), shares)
  dk_BKTH, dv_BKTU = _rotate(sums, plan)
  dtype = q_BKGTH.dtype
  return dq_BKGTH.astype(dtype), dk_BKTH.astype(dtype), dv_BKTU.astype(dtype), None


_attend.defvjp(_forward, _backward)


def _rotate(arrays, plan: Plan):
  """Sends arrays from each rank to the next."""
  ring = jax.lax.axis_size(plan.axis)
  return jax.lax.ppermute(arrays, plan.axis, [(rank, (rank + 1) % ring) for rank in range(ring)])


def _merge_part(part: Part | None, q_BKGTH, rows: Rows, plan: Plan, state, k_BKTH, v_BKTU, source):
  """Returns output and logsumexp over the keys seen so far and those of this part."""
  if part is None:
    return state
  o_BKGTU, lse_BKGT1 = state
  tokens = tokens_of_part(part, rows, plan, k_BKTH.shape[2], source)
  keys, values = k_BKTH[:, :, part.keys], v_BKTU[:, :, part.keys]
  new_o, new_lse = xla.attend_to_part(
    q_BKGTH[:, :, :, part.queries], keys, values, tokens, part.options
  )
  old_o, old_lse = o_BKGTU[:, :, :, part.queries], lse_BKGT1[:, :, :, part.queries]
  lse = jnp.logaddexp(old_lse, new_lse)
  total = jnp.where(jnp.isneginf(lse), 0, lse)  # a row that has seen no key stays at 0
  o = old_o * jnp.exp(old_lse - total) + new_o * jnp.exp(new_lse - total)
  untouched = slice(0, part.queries.start or 0)
  return (
    jnp.concatenate([o_BKGTU[:, :, :, untouched], o], axis=3),
    jnp.concatenate([lse_BKGT1[:, :, :, untouched], lse], axis=3),
  )


def _pull_part(
  part: Part | None, queries: Queries, rows: Rows, plan: Plan, dq_BKGTH, k_BKTH, v_BKTU, source
):
  """Returns dq with this part's share added, and the share of dk and dv, all in float32."""
  if part is None:
    like = (dq_BKGTH, k_BKTH, v_BKTU)
    zeros = [zeros_varying_like(x.shape, dq_BKGTH.dtype, like) for x in (k_BKTH, v_BKTU)]
    return dq_BKGTH, tuple(zeros)
  T = k_BKTH.shape[2]
  tokens = tokens_of_part(part, rows, plan, T, source)
  queries = Queries(*(x[:, :, :, part.queries] for x in queries))
  keys, values = k_BKTH[:, :, part.keys], v_BKTU[:, :, part.keys]
  dq, dk, dv = xla.gradients_of_part(*queries, keys, values, tokens, part.options)
  untouched = slice(0, part.queries.start or 0)
  whole_dq = dq_BKGTH[:, :, :, part.queries] + dq
  dq_BKGTH = jnp.concatenate([dq_BKGTH[:, :, :, untouched], whole_dq], axis=3)
  after = ((0, 0), (0, 0), (0, T - dk.shape[2]), (0, 0))
  return dq_BKGTH, (jnp.pad(dk, after), jnp.pad(dv, after))
