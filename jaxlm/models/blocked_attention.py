"""Causal attention for CPU: blocks of queries in plain products, with a backward pass of its own.

XLA on CPU is slow in the products that automatic differentiation asks for (the transpose of a [R, S] array times a
narrow one) and in the sums over H that softmax's gradient takes. Here the gradients of keys and values come out
transposed, [H, S], and are turned round once; the division by softmax's sum is done on the narrow side of a product,
and the mean that its gradient subtracts is sum_H do o (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
"""

# B batch, T positions, N query heads, K key heads, G = N / K, H head width, C queries of a block, R = G * C rows of one
# product, S keys that a block sees

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models.dense_attention import MASKED, causal_mask, soft_cap


class Block(NamedTuple):
  """Queries [start, stop) and the keys [first, stop) that they see."""

  start: int
  stop: int
  first: int


class Softmax(NamedTuple):
  """What the backward pass needs of a block's softmax: probabilities are exponentials / mass."""

  exponentials_BKRS: jax.Array
  mass_BKR1: jax.Array
  slope_BKRS: jax.Array | None  # of the soft cap, if there is one


def blocked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None, window=None, cap=None) -> jax.Array:
  """Query blocks, each against only the keys that it can see: half the work of the full square.

  Arguments and result as in `dense_attention`. Has reverse-mode gradients only.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  o_BKGTH = _attend(
    q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segment_ids_BT, window, cap
  )
  return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, window: int | None, cap: float | None
) -> jax.Array:
  return _forward(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, window, cap)[0]


def _forward(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, window, cap):
  # written once: fused into every block's slice, what came before would be computed again in each
  q_BKGTH, k_BKTH, v_BKTH = jax.lax.optimization_barrier((q_BKGTH, k_BKTH, v_BKTH))
  B, K, G, T, H = q_BKGTH.shape
  outs, kept = [], []
  for block in _blocks(T, H, window):
    keys = slice(block.first, block.stop)
    bent_BKRS = soft_cap(_dot("bkrh,bksh->bkrs", _rows(q_BKGTH, block), k_BKTH[:, :, keys]), cap)
    mask_BRS = jnp.tile(_mask(block, segment_ids_BT, window), (1, G, 1))
    a_BKRS = jnp.where(mask_BRS[:, None], bent_BKRS, MASKED)
    e_BKRS = jnp.exp(a_BKRS - jnp.max(a_BKRS, axis=-1, keepdims=True))
    mass_BKR1 = jnp.sum(e_BKRS, axis=-1, keepdims=True)
    o_BKRH = _dot("bkrs,bksh->bkrh", e_BKRS.astype(v_BKTH.dtype), v_BKTH[:, :, keys]) / mass_BKR1
    outs.append(o_BKRH.astype(v_BKTH.dtype).reshape(B, K, G, -1, H))
    kept.append(
      Softmax(e_BKRS, mass_BKR1, None if cap is None else 1 - jnp.square(bent_BKRS / cap))
    )
  o_BKGTH = jnp.concatenate(outs, axis=3)
  return o_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, o_BKGTH, kept)


def _backward(window, cap, residuals, do_BKGTH):
  q_BKGTH, k_BKTH, v_BKTH, o_BKGTH, kept = residuals
  B, K, G, T, H = q_BKGTH.shape
  dtype = q_BKGTH.dtype
  do_BKGTH = jax.lax.optimization_barrier(do_BKGTH.astype(jnp.float32))
  product_BKGTH = do_BKGTH * o_BKGTH.astype(jnp.float32)
  # four axes, because XLA on CPU takes 15 times as long for the same sum over the last of five
  mean_BKGT1 = jnp.sum(product_BKGTH.reshape(B, K * G, T, H), axis=-1).reshape(B, K, G, T, 1)
  blocks = _blocks(T, H, window)
  dqs, dks, dvs = [], [], []
  for block, (e_BKRS, mass_BKR1, slope_BKRS) in zip(blocks, kept):
    keys = slice(block.first, block.stop)
    mean_BKR1 = _rows(mean_BKGT1, block) / mass_BKR1
    do_BKRH = (_rows(do_BKGTH, block) / mass_BKR1).astype(dtype)
    da_BKRS = e_BKRS * (_dot("bkrh,bksh->bkrs", do_BKRH, v_BKTH[:, :, keys]) - mean_BKR1)
    da_BKRS = (da_BKRS if slope_BKRS is None else da_BKRS * slope_BKRS).astype(dtype)
    dqs.append(
      _dot("bkrs,bksh->bkrh", da_BKRS, k_BKTH[:, :, keys]).astype(dtype).reshape(B, K, G, -1, H)
    )
    dks.append(_dot("bkrh,bkrs->bkhs", _rows(q_BKGTH, block), da_BKRS))
    dvs.append(_dot("bkrh,bkrs->bkhs", do_BKRH, e_BKRS.astype(dtype)))
  dk_BKTH, dv_BKTH = (_sum_by_key(parts, blocks).astype(dtype) for parts in (dks, dvs))
  return jnp.concatenate(dqs, axis=3), dk_BKTH, dv_BKTH, None


_attend.defvjp(_forward, _backward)


def _blocks(T: int, H: int, window: int | None) -> list[Block]:
  least = (
    64 if H < 64 else 128
  )  # wide heads gain more from larger products than they lose to masked entries
  C = max(least, -(-T // 16 // 64) * 64)  # at most about 16 blocks, which are unrolled
  starts = range(0, T, C)
  return [
    Block(start, min(start + C, T), 0 if window is None else max(0, start - window + 1))
    for start in starts
  ]


def _mask(block: Block, segment_ids_BT: jax.Array | None, window: int | None) -> jax.Array:
  """bool [B or 1, C, S], true where the query sees the key."""
  start, stop, first = block
  mask_BCS = causal_mask(jnp.arange(start, stop)[None], jnp.arange(first, stop)[None], window)
  if segment_ids_BT is None:
    return mask_BCS
  return mask_BCS & (segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, first:stop])


def _rows(x_BKGTZ: jax.Array, block: Block) -> jax.Array:
  """The block's queries; the G heads of a group are stacked into the rows of one product: [B, K, G * C, Z]."""
  B, K, _, _, Z = x_BKGTZ.shape
  return x_BKGTZ[:, :, :, block.start : block.stop].reshape(B, K, -1, Z)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _sum_by_key(parts: list[jax.Array], blocks: list[Block]) -> jax.Array:
  """One [B, K, H, S] per block of queries -> their sum over blocks [B, K, T, H]."""
  total_BKHS, first, finished = parts[-1], blocks[-1].first, []
  for part_BKHS, block in zip(
    parts[-2::-1], blocks[-2::-1]
  ):  # earlier queries see no key after their block's last
    finished.append(total_BKHS[..., block.stop - first :])
    shared_BKHS = total_BKHS[..., : block.stop - first]
    total_BKHS = part_BKHS + jnp.pad(
      shared_BKHS, ((0, 0), (0, 0), (0, 0), (first - block.first, 0))
    )
    first = block.first
  return jnp.concatenate([total_BKHS, *finished[::-1]], axis=3).swapaxes(2, 3)
