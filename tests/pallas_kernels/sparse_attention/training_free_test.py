"""Training-free patterns: bounds, budgets, and that a budget for everything is dense attention."""

# B batch, T positions, N query heads, K key heads, H head width, P pages, C tokens of a cache
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.common.errors import UserError
from pallas_kernels.sparse_attention import nsa_selected_attention, training_free

B, T, N, K, H = 2, 50, 4, 2, 8
rng = np.random.default_rng(0)
q_BTNH, k_BTKH, v_BTKH = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K))
LINES = training_free.Lines(last=8, first=2, near=3)
EAGER = {
  "vertical-slash": lambda n: training_free.vertical_slash_mask(
    q_BTNH, k_BTKH, verticals=n, slashes=n, lines=LINES
  ),
  "flex": lambda n: training_free.flex_prefill_mask(
    q_BTNH, k_BTKH, mass=1e-6, least=n, lines=LINES
  ),
  "block-sparse": lambda n: training_free.block_sparse_mask(q_BTNH, k_BTKH, blocks=n, block=4),
}
MASKS = {name: jax.jit(mask, static_argnums=0) for name, mask in EAGER.items()}
masked_attention = jax.jit(training_free.masked_attention)
dense_attention = jax.jit(functools.partial(attention, implementation="reference"))
sparsity = jax.jit(training_free.sparsity)
quest_scores = jax.jit(training_free.quest_scores, static_argnames="page")
quest_pages = jax.jit(training_free.quest_pages, static_argnames="budget")


@pytest.mark.parametrize("name", MASKS)
def test_a_budget_for_everything_is_dense_and_a_small_one_is_sparse_and_causal(name):
  everything = MASKS[name](T)
  got = masked_attention(q_BTNH, k_BTKH, v_BTKH, everything)
  want = dense_attention(q_BTNH, k_BTKH, v_BTKH)
  chex.assert_trees_all_close(got, want, atol=1e-6)
  assert abs(float(sparsity(everything))) < 1e-6
  few = MASKS[name](4)
  assert 0.3 < float(sparsity(few)) < 1
  assert not np.any(np.triu(np.asarray(few).swapaxes(1, 2), 1))
  assert np.all(np.asarray(few)[:, np.arange(T), :, np.arange(T)])  # a token sees itself


def test_lines_are_the_heaviest_columns_and_diagonals():
  """Written out for one head: softmax of the last queries, sums by column and by offset."""
  mask_BTNS = np.asarray(MASKS["vertical-slash"](5))
  for b, n in ((0, 0), (1, 3)):
    columns, diagonals = np.zeros(T), np.zeros(T)
    for t in range(T - 8, T):
      e = np.exp(k_BTKH[b, : t + 1, n // 2] @ q_BTNH[b, t, n] / np.sqrt(H))
      columns[: t + 1] += e / e.sum()
      diagonals[t - np.arange(t + 1)] += e / e.sum()
    columns[:2] = diagonals[:3] = np.inf
    vertical, slash = (
      set(np.argsort(-x, kind="stable")[:5].tolist()) for x in (columns, diagonals)
    )
    for t, s in np.ndindex(T, T):
      assert mask_BTNS[b, t, n, s] == (s <= t and (s in vertical or t - s in slash))


def test_flex_sets_reach_the_mass():
  score = jnp.array([[[0.1, 0.5, 0.05, 0.3, 0.05]]])
  assert training_free._smallest(score, 0.8, 1)[0, 0].tolist() == [False, True, False, True, False]
  assert training_free._smallest(score, 0.81, 1)[0, 0].tolist() == [True, True, False, True, False]
  assert int(training_free._smallest(score, 0.1, 4).sum()) == 4


def test_block_sparse_forces_the_first_its_own_and_the_one_before():
  mask_BTNS = np.asarray(MASKS["block-sparse"](3))
  for t in range(T):
    seen = {s // 4 for s in np.flatnonzero(mask_BTNS[0, t, 0])}
    assert seen == {0, t // 4, max(0, t // 4 - 1)} & set(range(t // 4 + 1))


def test_snapkv_keeps_its_capacity_with_both_ends():
  kept = training_free.Kept(last=8, kernel=5, first=2, near=6)
  tokens = functools.partial(training_free.snapkv_tokens, kept=kept)
  tokens = jax.jit(tokens, static_argnames="capacity")
  got_BKC = np.asarray(tokens(q_BTNH, k_BTKH, capacity=20))
  chex.assert_shape(got_BKC, (B, K, 20))
  assert np.all(np.diff(got_BKC, axis=-1) > 0)
  for token in (0, 1, *range(T - 6, T)):
    assert np.all(np.any(got_BKC == token, axis=-1))
  everything = tokens(q_BTNH, k_BTKH, capacity=99)
  assert np.array_equal(everything, np.broadcast_to(np.arange(T), (B, K, T)))


def test_ada_snapkv_keeps_the_capacity_of_all_heads_together():
  kept = training_free.Kept(last=8, kernel=5, first=1, near=2)
  uneven = k_BTKH * np.array([3.0, 0.1], np.float32)[:, None]  # one head is far more certain
  ada_snapkv = functools.partial(training_free.ada_snapkv_mask, kept=kept)
  keep = jax.jit(ada_snapkv, static_argnames="capacity")
  kept_BKS = keep(q_BTNH, uneven, capacity=20)
  assert np.all(kept_BKS.sum(axis=(1, 2)) == 20 * K)
  assert np.all(kept_BKS.sum(axis=2) >= 4) and np.any(kept_BKS.sum(axis=2) != 20)
  assert np.all(kept_BKS[:, :, 0]) and np.all(kept_BKS[:, :, -2:])
  assert np.all(keep(q_BTNH, uneven, capacity=99))


def test_pooling_pads_with_zeros_and_divides_by_the_kernel():
  got = training_free._smooth(jnp.array([[[3.0, 6.0, 9.0]]]), 3)[0, 0]
  chex.assert_trees_all_close(got, np.array([3.0, 6.0, 5.0]), atol=1e-6)


def test_quest_scores_bound_every_product_of_a_page():
  score_BNP = np.asarray(quest_scores(q_BTNH[:, -1], k_BTKH, page=16))
  chex.assert_shape(score_BNP, (B, N, 4))
  products_BNS = np.einsum("bnh,bsnh->bns", q_BTNH[:, -1], np.repeat(k_BTKH, N // K, axis=2))
  for s in range(T):
    assert np.all(score_BNP[:, :, s // 16] >= products_BNS[:, :, s] - 1e-5)


def test_quest_pages_are_blocks_of_selected_attention():
  q_B1NH = q_BTNH[:, -1:]
  read = quest_pages(q_BTNH[:, -1], k_BTKH, budget=64)
  assert np.array_equal(read, np.broadcast_to(np.arange(4), (B, K, 4)))
  attend = jax.jit(functools.partial(nsa_selected_attention, block=16))
  got, _ = attend(q_B1NH, k_BTKH, v_BTKH, read[:, None])
  want = dense_attention(q_B1NH, k_BTKH, v_BTKH)
  chex.assert_trees_all_close(got, want, atol=1e-6)
  few = np.asarray(quest_pages(q_BTNH[:, -1], k_BTKH, budget=16))
  assert few.shape == (B, K, 2) and np.all(few[..., -1] == 3)  # the best, and the current page
  score = np.asarray(quest_scores(q_BTNH[:, -1], k_BTKH)).reshape(B, K, 2, 4).sum(2)
  assert np.array_equal(few[..., 0], score[..., :3].argmax(axis=-1))


def test_refused():
  with pytest.raises(UserError, match="mass=0: must be above 0 and at most 1"):
    training_free.flex_prefill_mask(q_BTNH, k_BTKH, mass=0)
  with pytest.raises(UserError, match="kernel=4: must be odd"):
    training_free.snapkv_tokens(q_BTNH, k_BTKH, capacity=3, kept=training_free.Kept(kernel=4))


def test_jit_changes_nothing():
  chex.assert_trees_all_equal(EAGER["block-sparse"](3), MASKS["block-sparse"](3))
