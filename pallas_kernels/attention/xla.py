"""Attends by blocks of queries in plain products, with a backward pass of its own.

Every block meets only the keys that it can see (`blocks.py`): for queries in order, half of the
square. On CPU the backward pass may read the exponentials that the forward pass kept. Elsewhere
blocks run one after another and are computed again: memory is linear in T.

XLA on CPU is slow in the products that automatic differentiation asks for (the transpose of a
[R, S] array times a narrow one) and in the sums over U that softmax's gradient takes. Here the
gradients of keys and values come out transposed, [H, S], and are turned round once; the division
by softmax's sum is done on the narrow side of a product, and the mean that its gradient subtracts
is sum_U do o (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values, C queries of a block, R = G * C rows of a product
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.blocks import Band, Plan, make_plan
from pallas_kernels.attention.mask import Options, Tokens, soft_cap, visible, with_positions
from pallas_kernels.common.shards import zeros_varying_like

MASKED = -1e30  # finite, so that a row that sees no key gives no NaN
UNSEEN = MASKED / 2  # the least maximum of a row, below which exp(MASKED - maximum) is still 0


class Softmax(NamedTuple):
  """Holds a block's softmax for the backward pass: probabilities are exponentials / mass."""

  exponentials_BKRS: jax.Array
  mass_BKR1: jax.Array
  slope_BKRS: jax.Array | None  # of the soft cap, if there is one


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
  *,
  keeps: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the output [B, T, N, U], and the logsumexp [B, T, N] if it is asked for.

  `keeps`: the backward pass may read kept exponentials, up to `blocks.KEPT_LENGTH` positions.
  Has reverse-mode gradients only.
  """
  B, T, N, H = q_BTNH.shape
  S, K, U = v_BSKU.shape[1:]
  plan = make_plan(q_BTNH.shape, S, options, tokens.in_order, keeps)
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  o_BKGTU, lse_BKGT1 = _attend(
    q_BKGTH,
    k_BSKH.swapaxes(1, 2),
    v_BSKU.swapaxes(1, 2),
    with_positions(tokens, T, S),
    plan,
    return_lse,
  )
  o_BTNU = o_BKGTU.transpose(0, 3, 1, 2, 4).reshape(B, T, N, U)
  return o_BTNU, None if lse_BKGT1 is None else lse_BKGT1.reshape(B, N, T).swapaxes(1, 2)


def attend_to_part(
  q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSU: jax.Array, tokens: Tokens, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Returns output [B, K, G, T, U] and logsumexp [B, K, G, T, 1] over some of a query's keys.

  Both are float32, or wider, to be merged with those over the other keys. Not to be differentiated:
  that is `gradients_of_part`'s, which knows the logsumexp over all keys.
  """
  plan = make_plan(_shape_BTNH(q_BKGTH), k_BKSH.shape[2], options, tokens.in_order, False)
  tokens = with_positions(tokens, q_BKGTH.shape[3], k_BKSH.shape[2])
  dtype = jnp.promote_types(q_BKGTH.dtype, jnp.float32)
  return _forward(q_BKGTH, k_BKSH, v_BKSU, tokens, plan, True, dtype)[0]


def gradients_of_part(
  q_BKGTH: jax.Array,
  do_BKGTU: jax.Array,
  lse_BKGT1: jax.Array,
  mean_BKGT1: jax.Array,
  k_BKSH: jax.Array,
  v_BKSU: jax.Array,
  tokens: Tokens,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns dq, dk and dv of some of a query's keys, float32 or wider; dq is their share of it.

  `lse_BKGT1` is the logsumexp over all keys, and `mean_BKGT1` what `mean_of_gradient` gives for the
  output over all keys.
  """
  plan = make_plan(_shape_BTNH(q_BKGTH), k_BKSH.shape[2], options, tokens.in_order, False)
  tokens = with_positions(tokens, q_BKGTH.shape[3], k_BKSH.shape[2])
  arrays = (q_BKGTH, k_BKSH, v_BKSU)
  return _gradients(*arrays, tokens, do_BKGTU, mean_BKGT1, plan, lse_BKGT1=lse_BKGT1)


def mean_of_gradient(do_BKGTU: jax.Array, o_BKGTU: jax.Array) -> jax.Array:
  """Returns what softmax's gradient subtracts, sum_U do o, [B, K, G, T, 1] in the dtype of do."""
  B, K, G, T, U = o_BKGTU.shape
  product_BKGTU = do_BKGTU * o_BKGTU.astype(do_BKGTU.dtype)
  # four axes, because XLA on CPU takes 15 times as long for the same sum over the last of five
  return jnp.sum(product_BKGTU.reshape(B, K * G, T, U), axis=-1).reshape(B, K, G, T, 1)


def _shape_BTNH(q_BKGTH: jax.Array) -> tuple[int, int, int, int]:
  B, K, G, T, H = q_BKGTH.shape
  return B, T, K * G, H


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BKGTH, k_BKSH, v_BKSU, tokens: Tokens, plan: Plan, return_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
  return _forward(q_BKGTH, k_BKSH, v_BKSU, tokens, plan, return_lse)[0]


def _forward(
  q_BKGTH, k_BKSH, v_BKSU, tokens: Tokens, plan: Plan, return_lse: bool, dtype: Any = None
):
  # written once: fused into every block's slice, what came before would be computed again in each
  q_BKGTH, k_BKSH, v_BKSU = jax.lax.optimization_barrier((q_BKGTH, k_BKSH, v_BKSU))
  B, K, G = q_BKGTH.shape[:3]

  def block(start: jax.Array | int, band: Band) -> tuple[tuple[jax.Array, jax.Array], Softmax]:
    softmax, max_BKR1 = _softmax(q_BKGTH, k_BKSH, tokens, start, band, plan.options)
    e_BKRS = softmax.exponentials_BKRS.astype(v_BKSU.dtype)
    v_BKSU_ = v_BKSU[:, :, band.first : band.last]
    o_BKRU = _dot("bkrs,bksu->bkru", e_BKRS, v_BKSU_) / softmax.mass_BKR1
    lse_BKR1 = max_BKR1 + jnp.log(softmax.mass_BKR1)
    lse_BKR1 = jnp.where(max_BKR1 == UNSEEN, -jnp.inf, lse_BKR1)
    o_BKGCU = o_BKRU.reshape(B, K, G, band.C, -1).astype(dtype or v_BKSU.dtype)
    return (o_BKGCU, lse_BKR1.reshape(B, K, G, band.C, 1)), softmax

  softmaxes: tuple[Softmax, ...] = ()
  if plan.keeps:
    rows, softmaxes = zip(*(block(band.start, band) for band in plan.bands))
  else:
    rows = tuple(_run_blocks(lambda *at: (block(*at)[0], ()), band)[0] for band in plan.bands)
  outputs, normalisers = zip(*rows)
  o_BKGTU = jnp.concatenate(outputs, axis=3)
  lse_BKGT1 = blind_BKGT1 = None
  if return_lse:
    lse_BKGT1 = jnp.concatenate(normalisers, axis=3)
    blind_BKGT1 = jnp.isneginf(lse_BKGT1)
  residuals = (q_BKGTH, k_BKSH, v_BKSU, tokens, o_BKGTU, blind_BKGT1, softmaxes)
  return (o_BKGTU, lse_BKGT1), residuals


def _backward(plan: Plan, return_lse: bool, residuals, cotangents):
  q_BKGTH, k_BKSH, v_BKSU, tokens, o_BKGTU, blind_BKGT1, softmaxes = residuals
  do_BKGTU, dlse_BKGT1 = cotangents
  dtype = jnp.promote_types(q_BKGTH.dtype, jnp.float32)
  do_BKGTU = jax.lax.optimization_barrier(do_BKGTU.astype(dtype))
  mean_BKGT1 = mean_of_gradient(do_BKGTU, o_BKGTU)
  if return_lse:
    mean_BKGT1 = mean_BKGT1 - jnp.where(blind_BKGT1, 0, dlse_BKGT1)
  arrays = (q_BKGTH, k_BKSH, v_BKSU)
  grads = _gradients(*arrays, tokens, do_BKGTU, mean_BKGT1, plan, softmaxes)
  return *(grad.astype(q_BKGTH.dtype) for grad in grads), None


def _gradients(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSU: jax.Array,
  tokens: Tokens,
  do_BKGTU: jax.Array,
  mean_BKGT1: jax.Array,
  plan: Plan,
  softmaxes: tuple[Softmax, ...] = (),
  lse_BKGT1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns dq, dk and dv, in float32 or wider.

  Softmax comes from `softmaxes` where the plan keeps them, else it is computed again, from the
  logsumexp where that is given.
  """
  B, K, G = q_BKGTH.shape[:3]
  dtype, scale = q_BKGTH.dtype, plan.options.scale

  def block(start: jax.Array | int, band: Band, softmax: Softmax):
    e_BKRS, mass_BKR1, slope_BKRS = softmax
    k_BKSH_ = k_BKSH[:, :, band.first : band.last]
    v_BKSU_ = v_BKSU[:, :, band.first : band.last]
    mean_BKR1 = _rows(mean_BKGT1, start, band.C) / mass_BKR1
    do_BKRU = (_rows(do_BKGTU, start, band.C) / mass_BKR1).astype(dtype)
    da_BKRS = e_BKRS * (_dot("bkru,bksu->bkrs", do_BKRU, v_BKSU_) - mean_BKR1)
    da_BKRS = (da_BKRS if slope_BKRS is None else da_BKRS * slope_BKRS).astype(dtype)
    dq_BKRH = scale * _dot("bkrs,bksh->bkrh", da_BKRS, k_BKSH_)
    dk_BKHS = scale * _dot("bkrh,bkrs->bkhs", _rows(q_BKGTH, start, band.C), da_BKRS)
    dv_BKUS = _dot("bkru,bkrs->bkus", do_BKRU, e_BKRS.astype(dtype))
    return dq_BKRH.reshape(B, K, G, band.C, -1), (dk_BKHS, dv_BKUS)

  def block_again(start: jax.Array | int, band: Band):
    arrays = (q_BKGTH, k_BKSH, tokens, start, band, plan.options)
    return block(start, band, _softmax(*arrays, lse_BKGT1)[0])

  if plan.keeps:
    parts = [block(band.start, band, softmax) for band, softmax in zip(plan.bands, softmaxes)]
  else:
    like = (q_BKGTH, k_BKSH, v_BKSU, do_BKGTU)
    parts = [_run_blocks(block_again, band, like) for band in plan.bands]
  dqs, sums = zip(*parts)
  dks, dvs = zip(*sums)
  dk_BKSH, dv_BKSU = _sum_by_key(dks, plan.bands), _sum_by_key(dvs, plan.bands)
  return jnp.concatenate(dqs, axis=3), dk_BKSH, dv_BKSU


_attend.defvjp(_forward, _backward)


def _softmax(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  tokens: Tokens,
  start: jax.Array | int,
  band: Band,
  options: Options,
  lse_BKGT1: jax.Array | None = None,
) -> tuple[Softmax, jax.Array]:
  """Returns the softmax of one block's logits, and their maxima [B, K, R, 1].

  With the logsumexp over all keys, of which the block may have some, that takes the place of both
  maxima and mass.
  """
  G = q_BKGTH.shape[2]
  k_BKSH = k_BKSH[:, :, band.first : band.last]
  a_BKRS = options.scale * _dot("bkrh,bksh->bkrs", _rows(q_BKGTH, start, band.C), k_BKSH)
  a_BKRS = bent_BKRS = soft_cap(a_BKRS, options.cap)
  mask_BCS = visible(_tokens_of(tokens, start, band), options)
  if mask_BCS is not None:
    a_BKRS = jnp.where(jnp.tile(mask_BCS, (1, G, 1))[:, None], a_BKRS, MASKED)
  if lse_BKGT1 is None:
    max_BKR1 = jnp.maximum(jnp.max(a_BKRS, axis=-1, keepdims=True), UNSEEN)
    e_BKRS = jnp.exp(a_BKRS - max_BKR1)
    mass_BKR1 = jnp.sum(e_BKRS, axis=-1, keepdims=True)
    mass_BKR1 = jnp.where(mass_BKR1 == 0, 1, mass_BKR1)
  else:
    max_BKR1 = jnp.maximum(_rows(lse_BKGT1, start, band.C), UNSEEN)
    e_BKRS = jnp.exp(a_BKRS - max_BKR1)
    mass_BKR1 = jnp.ones_like(max_BKR1)
  slope_BKRS = None if options.cap is None else 1 - jnp.square(bent_BKRS / options.cap)
  return Softmax(e_BKRS, mass_BKR1, slope_BKRS), max_BKR1


def _tokens_of(tokens: Tokens, start: jax.Array | int, band: Band) -> Tokens:
  """Returns the block's tokens: C queries, and the band's keys."""

  def rows(x_BT: jax.Array | None) -> jax.Array | None:
    return None if x_BT is None else jax.lax.dynamic_slice_in_dim(x_BT, start, band.C, axis=1)

  def keys(x_BS: jax.Array | None) -> jax.Array | None:
    return None if x_BS is None else x_BS[:, band.first : band.last]

  q_positions, k_positions, q_segments, k_segments = tokens
  return Tokens(rows(q_positions), keys(k_positions), rows(q_segments), keys(k_segments))


def _rows(x_BKGTZ: jax.Array, start: jax.Array | int, C: int) -> jax.Array:
  """Returns C queries; a group's G heads are stacked into the rows of one product: [B, K, R, Z]."""
  B, K, _, _, Z = x_BKGTZ.shape
  return jax.lax.dynamic_slice_in_dim(x_BKGTZ, start, C, axis=3).reshape(B, K, -1, Z)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(spec, x, y, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST)


def _run_blocks(
  block: Callable[[Any, Band], tuple[Any, Any]], band: Band, like: Any = ()
) -> tuple[Any, Any]:
  """Runs a band's blocks one after another, concatenates their first results, sums the others.

  `block(start, band)` returns a tree of arrays [B, K, G, C, Z], and one of arrays to be summed.
  The sums vary over the same mesh axes as the arrays `like`.
  """
  if band.C == band.stop - band.start:
    return block(band.start, band)
  starts = jnp.arange(band.start, band.stop, band.C)
  shapes = jax.eval_shape(lambda start: block(start, band)[1], starts[0])
  zeros = jax.tree.map(lambda x: zeros_varying_like(x.shape, x.dtype, like), shapes)

  def step(sums: Any, start: jax.Array) -> tuple[Any, Any]:
    rows, shares = block(start, band)
    return jax.tree.map(jnp.add, sums, shares), rows

  sums, rows = jax.lax.scan(step, zeros, starts)
  return jax.tree.map(_merge_blocks, rows), sums


def _merge_blocks(x: jax.Array) -> jax.Array:
  """Merges [blocks, B, K, G, C, Z] to [B, K, G, blocks * C, Z]."""
  blocks, B, K, G, C, Z = x.shape
  return x.transpose(1, 2, 3, 0, 4, 5).reshape(B, K, G, blocks * C, Z)


def _sum_by_key(parts: tuple[jax.Array, ...], bands: tuple[Band, ...]) -> jax.Array:
  """Sums one [B, K, Z, keys] per band over the bands; returns [B, K, S, Z]."""
  total_BKZS, first, finished = parts[-1], bands[-1].first, []
  for part_BKZS, band in zip(parts[-2::-1], bands[-2::-1]):
    finished.append(total_BKZS[..., band.last - first :])  # earlier queries see no later key
    shared_BKZS = total_BKZS[..., : band.last - first]
    total_BKZS = part_BKZS + _pad_keys(shared_BKZS, first - band.first)
    first = band.first
  total_BKZS = jnp.concatenate([_pad_keys(total_BKZS, first), *finished[::-1]], axis=3)
  return total_BKZS.swapaxes(2, 3)


def _pad_keys(x_BKZS: jax.Array, keys: int) -> jax.Array:
  """Puts zeros before the first key."""
  return jnp.pad(x_BKZS, ((0, 0), (0, 0), (0, 0), (keys, 0)))
