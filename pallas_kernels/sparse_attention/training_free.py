"""Sparsifies the attention of a trained dense model, without training: masks and lists of tokens.

For prefill (vertical-slash, FlexPrefill, block-sparse) masks say which keys a query attends to; for
a cache (SnapKV, Ada-SnapKV) which tokens stay; for decoding (Quest) which pages are read. Scores
are float32. Masks are T x S numbers: these are for studies of accuracy, not for speed.

Source: arXiv 2504.17768 with its code, PiotrNawrot/sparse-frontier; Quest: arXiv 2406.10774.
"""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K, H head width,
# A last queries, X query blocks, J key blocks, P pages, C tokens that a cache keeps
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import check, check_shape
from pallas_kernels.common.padding import pad_axis, round_up
from pallas_kernels.sparse_attention import reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
  """Says which queries score columns and diagonals, and which of these are always chosen."""

  last: int = 256  # queries whose attention is summed
  first: int = 4  # columns
  near: int = 64  # diagonals, from the query itself on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
  """Says which queries score the tokens of a cache, and which of these always stay."""

  last: int = 256  # queries whose attention is taken
  kernel: int = 21  # neighbours that a score is averaged over
  first: int = 4  # tokens
  near: int = 128  # last tokens


LINES, KEPT = Lines(), Kept()


def masked_attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, mask_BTNS: jax.Array
) -> jax.Array:
  """Returns attention [B, T, N, U] to the keys that the mask of each head leaves."""
  G = q_BTNH.shape[2] // k_BSKH.shape[2]
  k_BSNH, v_BSNU = (jnp.repeat(x, G, axis=2) for x in (k_BSKH, v_BSKU))
  return reference.masked_attention(q_BTNH, k_BSNH, v_BSNU, mask_BTNS, q_BTNH.shape[-1] ** -0.5)[0]


def sparsity(mask_BTNS: jax.Array) -> jax.Array:
  """Returns 1 - kept / causal pairs; the last query stands at the last key."""
  T, S = mask_BTNS.shape[1], mask_BTNS.shape[3]
  causal_TS = _offsets(T, S) >= 0
  kept = jnp.mean(jnp.sum(mask_BTNS & causal_TS[None, :, None], axis=(1, 3), dtype=jnp.float32))
  return 1 - kept / jnp.sum(causal_TS)


def vertical_slash_mask(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  verticals: int,
  slashes: int,
  lines: Lines = LINES,
) -> jax.Array:
  """Returns bool [B, T, N, S]: each head's heaviest `verticals` columns and `slashes` diagonals."""
  columns_BNS, diagonals_BNS = _column_and_diagonal_mass(q_BTNH, k_BSKH, lines)
  S = k_BSKH.shape[1]
  chosen = _top(columns_BNS, verticals), _top(diagonals_BNS, slashes)
  return _lines(*chosen, q_BTNH.shape[1], S)


def flex_prefill_mask(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  mass: float,
  least: int = 512,
  lines: Lines = LINES,
) -> jax.Array:
  """Returns bool [B, T, N, S]: each head's smallest sets of columns and diagonals with this mass.

  A set is the heaviest lines whose share of the last queries' attention reaches `mass`, and never
  fewer than `least` lines.
  """
  check(0 < mass <= 1, "mass", mass, "must be above 0 and at most 1")
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  free = dataclasses.replace(lines, first=0, near=0)
  columns_BNS, diagonals_BNS = _column_and_diagonal_mass(q_BTNH, k_BSKH, free)
  columns_BNS = _smallest(columns_BNS, mass, least) | _forced(S, lines.first)[None, None]
  diagonals_BNS = _smallest(diagonals_BNS, mass, least) | _forced(S, lines.near)[None, None]
  return _lines(columns_BNS, diagonals_BNS, T, S)


def block_sparse_mask(
  q_BTNH: jax.Array, k_BTKH: jax.Array, *, blocks: int, block: int = 16
) -> jax.Array:
  """Returns bool [B, T, N, T]: for each block of queries the key blocks with the best mean.

  Scores are products of mean queries and mean keys; of the `blocks` are the first, a block's own
  and the one before it.
  """
  B, T, N, H = q_BTNH.shape
  check_shape("k_BTKH", k_BTKH, (B, T, None, H))
  sizes_X = jnp.minimum(block, T - jnp.arange(0, T, block))[None, :, None, None]

  def means(x_BTZH: jax.Array) -> jax.Array:
    x_BTZH = pad_axis(x_BTZH.astype(jnp.float32), round_up(T, block), 1)
    return jnp.sum(x_BTZH.reshape(B, -1, block, *x_BTZH.shape[2:]), axis=2) / sizes_X

  k_BJNH = jnp.repeat(means(k_BTKH), N // k_BTKH.shape[2], axis=2)
  score_BNXJ = _dot("bxnh,bjnh->bnxj", means(q_BTNH), k_BJNH)
  behind_XJ = _offsets(*score_BNXJ.shape[2:])
  forced_XJ = (behind_XJ == 0) | (behind_XJ == 1) | (jnp.arange(score_BNXJ.shape[3]) == 0)[None]
  score_BNXJ = jnp.where(forced_XJ[None, None], jnp.inf, score_BNXJ)
  chosen_BNXJ = _top(jnp.where(behind_XJ[None, None] < 0, -jnp.inf, score_BNXJ), blocks)
  chosen_BNTS = jnp.repeat(jnp.repeat(chosen_BNXJ, block, axis=2), block, axis=3)[:, :, :T, :T]
  return (chosen_BNTS & (_offsets(T, T) >= 0)[None, None]).swapaxes(1, 2)


def snapkv_tokens(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  capacity: int,
  kept: Kept = KEPT,
) -> jax.Array:
  """Returns the tokens that each key head's cache keeps, int32 [B, K, C], ascending.

  Scores are the last queries' attention, averaged over a group's heads, summed over queries and
  smoothed.
  """
  weight_BKGAS = _last_attention(q_BTNH, k_BSKH, kept.last)
  score_BKS = _smooth(jnp.sum(jnp.mean(weight_BKGAS, axis=2), axis=2), kept.kernel)
  score_BKS = jnp.where(_ends(score_BKS.shape[-1], kept)[None, None], jnp.inf, score_BKS)
  _, token_BKC = jax.lax.top_k(score_BKS, min(capacity, score_BKS.shape[-1]))
  return jnp.sort(token_BKC, axis=-1).astype(jnp.int32)


def ada_snapkv_mask(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  capacity: int,
  kept: Kept = KEPT,
  share: float = 0.2,
) -> jax.Array:
  """Returns bool [B, K, S]: which tokens stay, `capacity` a head on average.

  Scores are the largest attention of the last queries and a group's heads, smoothed. Each head
  keeps its own best `share` of the capacity; the heads together share the rest by score.
  """
  check(0 <= share <= 1, "share", share, "must be between 0 and 1")
  weight_BKGAS = _last_attention(q_BTNH, k_BSKH, kept.last)
  score_BKS = _smooth(jnp.max(weight_BKGAS, axis=(2, 3)), kept.kernel)
  (B, K, S), capacity = score_BKS.shape, min(capacity, k_BSKH.shape[1])
  score_BKS = jnp.where(_ends(S, kept)[None, None], jnp.inf, score_BKS)
  own_BKS = _top(score_BKS, int(share * capacity))
  # a head's own tokens come before every other's
  rank_BKS = jnp.argsort(jnp.argsort(-score_BKS, axis=-1, stable=True), axis=-1, stable=True)
  before_BKS = jnp.where(own_BKS, 0, 1)
  keys = (before_BKS.reshape(B, -1), -score_BKS.reshape(B, -1), rank_BKS.reshape(B, -1))
  place = jnp.broadcast_to(jnp.arange(K * S, dtype=jnp.int32)[None], (B, K * S))
  *_, order = jax.lax.sort((*keys, place), num_keys=3, is_stable=True)
  rows = jnp.arange(B)[:, None]
  stays = jnp.zeros((B, K * S), bool).at[rows, order[:, : capacity * K]].set(True)
  return stays.reshape(B, K, S)


def quest_scores(q_BNH: jax.Array, k_BSKH: jax.Array, *, page: int = 16) -> jax.Array:
  """Returns sum_H max(q least, q greatest) of each page of keys, float32 [B, N, P].

  It is at least the product of the query with any key of the page.
  """
  B, S, K, H = k_BSKH.shape
  k_BSKH = k_BSKH.astype(jnp.float32)
  padded = round_up(S, page)
  extremes = []
  for reduce, fill in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf)):
    k_BPLKH = pad_axis(k_BSKH, padded, 1, fill).reshape(B, padded // page, page, K, H)
    extremes.append(jnp.repeat(reduce(k_BPLKH, axis=2), q_BNH.shape[1] // K, axis=2))
  q_B1NH = q_BNH.astype(jnp.float32)[:, None]
  low_BPNH, high_BPNH = (q_B1NH * extreme_BPNH for extreme_BPNH in extremes)
  return jnp.sum(jnp.maximum(low_BPNH, high_BPNH), axis=-1).swapaxes(1, 2)


def quest_pages(q_BNH: jax.Array, k_BSKH: jax.Array, *, budget: int, page: int = 16) -> jax.Array:
  """Returns the pages that a decoded query reads, int32 [B, K, P + 1], ascending.

  `budget` tokens' worth of pages by the scores of a group's heads, and the current page, which
  holds the last key. They are blocks for `nsa_selected_attention` with `block=page`.
  """
  B, S, K, _ = k_BSKH.shape
  score_BNP = quest_scores(q_BNH, k_BSKH, page=page)
  score_BKP = jnp.sum(score_BNP.reshape(B, K, -1, score_BNP.shape[-1]), axis=2)
  current = (S - 1) // page
  score_BKP = score_BKP.at[:, :, current].set(jnp.inf)
  _, page_BKP = jax.lax.top_k(score_BKP, min(budget // page + 1, current + 1))
  return jnp.sort(page_BKP, axis=-1).astype(jnp.int32)


def _last_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, last: int) -> jax.Array:
  """Returns causal softmax of the last queries over all keys, float32 [B, K, G, A, S]."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  check(last >= 1, "last", last, "must be at least 1")
  A = min(last, T)
  q_BAKGH = q_BTNH[:, T - A :].astype(jnp.float32).reshape(B, A, K, N // K, H)
  a_BKGAS = H**-0.5 * _dot("bakgh,bskh->bkgas", q_BAKGH, k_BSKH.astype(jnp.float32))
  return jax.nn.softmax(jnp.where(_offsets(A, S) >= 0, a_BKGAS, -jnp.inf), axis=-1)


def _column_and_diagonal_mass(
  q_BTNH: jax.Array, k_BSKH: jax.Array, lines: Lines
) -> tuple[jax.Array, jax.Array]:
  """Returns the mass of columns and of diagonals, [B, N, S] each; infinite for forced ones."""
  weight_BKGAS = _last_attention(q_BTNH, k_BSKH, lines.last)
  B, K, G, A, S = weight_BKGAS.shape
  weight_BNAS = weight_BKGAS.reshape(B, K * G, A, S)
  columns_BNS = jnp.sum(weight_BNAS, axis=2)
  behind_AS = _offsets(A, S)
  at_AS = jnp.where(behind_AS < 0, S, behind_AS).reshape(-1)
  flat_BNZ = weight_BNAS.reshape(B, K * G, A * S)
  diagonals_BNS = jnp.zeros((B, K * G, S + 1)).at[:, :, at_AS].add(flat_BNZ)[..., :S]
  columns_BNS = jnp.where(_forced(S, lines.first)[None, None], jnp.inf, columns_BNS)
  return columns_BNS, jnp.where(_forced(S, lines.near)[None, None], jnp.inf, diagonals_BNS)


def _lines(columns_BNS: jax.Array, diagonals_BNS: jax.Array, T: int, S: int) -> jax.Array:
  """Returns bool [B, T, N, S]: keys in a chosen column or on a chosen diagonal, none ahead."""
  behind_TS = _offsets(T, S)
  on_diagonal_BNTS = diagonals_BNS[:, :, jnp.maximum(behind_TS, 0)]
  mask_BNTS = (columns_BNS[:, :, None] | on_diagonal_BNTS) & (behind_TS >= 0)[None, None]
  return mask_BNTS.swapaxes(1, 2)


def _top(score: jax.Array, count: int) -> jax.Array:
  """Returns bool of the same shape: the `count` best of the last axis; -inf is never chosen."""
  order = jnp.argsort(-score, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1, stable=True)
  return (rank < count) & ~jnp.isneginf(score)


def _smallest(score_BNS: jax.Array, mass: float, least: int) -> jax.Array:
  """Returns bool [B, N, S]: the fewest entries that hold `mass` of the sum, at least `least`."""
  sorted_BNS = -jnp.sort(-score_BNS, axis=-1)
  before_BNS = jnp.cumsum(sorted_BNS, axis=-1) - sorted_BNS
  enough_BN1 = mass * jnp.sum(score_BNS, axis=-1, keepdims=True)
  count_BN1 = jnp.maximum(jnp.sum(before_BNS < enough_BN1, axis=-1, keepdims=True), least)
  rank_BNS = jnp.argsort(jnp.argsort(-score_BNS, axis=-1, stable=True), axis=-1, stable=True)
  return rank_BNS < count_BN1


def _smooth(score_BKS: jax.Array, kernel: int) -> jax.Array:
  """Returns averages over `kernel` neighbours: zeros beyond the ends, divided by the kernel."""
  check(kernel % 2 == 1, "kernel", kernel, "must be odd")
  S = score_BKS.shape[-1]
  sums = jnp.cumsum(jnp.pad(score_BKS, ((0, 0), (0, 0), (kernel // 2 + 1, kernel // 2))), axis=-1)
  return (sums[..., kernel:] - sums[..., :S]) / kernel


def _offsets(T: int, S: int) -> jax.Array:
  """Returns how far a key stands behind a query, [T, S]; the last of both stand together."""
  return (S - T) + jnp.arange(T)[:, None] - jnp.arange(S)[None]


def _forced(S: int, count: int) -> jax.Array:
  return jnp.arange(S) < count


def _ends(S: int, kept: Kept) -> jax.Array:
  return (jnp.arange(S) < kept.first) | (jnp.arange(S) >= S - kept.near)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)
