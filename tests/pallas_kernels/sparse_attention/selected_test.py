"""Attention to given lists of blocks: values and gradients against the float64 reference."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries and keys, U width of values, I selected blocks of a query
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.attention import attention
from pallas_kernels.sparse_attention import nsa_selected_attention

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

BASE = dict(T=70)
CASES = {
  "several chunks": BASE,
  "packed": dict(T=70, packed=True),
  "12 heads a group": dict(T=40, N=12, K=1),
  "one head a group": dict(T=40, N=2, K=2),
  "T=1": dict(T=1, block=64),
  "T=9": dict(T=9, block=64),
  **{f"T={T}": dict(T=T, block=64, I=2) for T in (31, 32, 63, 64, 65)},
  "one block": dict(T=70, I=1),
  "paper's widths": dict(T=130, N=16, K=1, H=192, U=128, I=4, B=1),
}
QUICK = ("several chunks", "packed", "12 heads a group", "T=1")


@pytest.mark.parametrize("name", QUICK)
def test_values_and_gradients(name, run, expected, assert_close):
  assert_close(run(CASES[name], "xla"), expected(CASES[name]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_cases(name, run, expected, assert_close):
  test_values_and_gradients(name, run, expected, assert_close)


def test_bfloat16(case, run, expected, assert_close):
  call = dict(T=70, H=64, U=64)
  *arrays, dlse_BTN = case(**call).arrays(jnp.bfloat16)
  arrays = (*arrays, dlse_BTN)
  got = run(call, "xla", arrays)
  chex.assert_type([got[key] for key in ("o", "dq", "dk", "dv")], jnp.bfloat16)
  chex.assert_type(got["lse"], jnp.float32)
  assert_close(got, expected(call, arrays), 4e-3, 6e-3)


@pytest.mark.parametrize("name", ["reference", pytest.param("xla", marks=pytest.mark.slow)])
def test_gradients_in_float64(name, case):
  """By finite differences of what has a backward pass of its own."""
  made = case(T=9, N=2, K=1, H=3, U=2, I=2, B=1, block=4)
  attend = functools.partial(nsa_selected_attention, block=4, implementation=name)
  with jax.enable_x64(True):
    arrays = [jnp.asarray(array, jnp.float64) for array in made.arrays()[:3]]
    own_BTKI = np.stack([made.lists()[..., 0], np.arange(9)[None, :, None] // 4], axis=3)
    outputs = jax.jit(lambda *arrays: attend(*arrays, own_BTKI))
    check_grads(outputs, arrays, order=1, modes=["rev"])


def plain(q_BTNH, k_BSKH, v_BSKU, ids_BS, lists_BTKI, block):
  """Writes out the definition in numpy, one query and head at a time."""
  (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
  o_BTNU, lse_BTN = np.zeros((B, T, N, v_BSKU.shape[3])), np.full((B, T, N), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    kv, first = n // (N // K), int(np.argmax(ids_BS[b] == ids_BS[b, t]))
    chosen = set(lists_BTKI[b, t, kv].tolist())
    seen = [s for s in range(first, t + 1) if (s - first) // block in chosen]
    if seen:
      a_S = k_BSKH[b, seen, kv] @ q_BTNH[b, t, n] / np.sqrt(H)
      lse_BTN[b, t, n] = np.log(np.sum(np.exp(a_S)))
      o_BTNU[b, t, n] = np.exp(a_S - lse_BTN[b, t, n]) @ v_BSKU[b, seen, kv]
  return {"o": o_BTNU, "lse": lse_BTN}


def test_reference_is_the_definition(case, run, assert_close):
  call = dict(T=70, packed=True)
  made = case(**call)
  arrays = (np.float64(array) for array in made.arrays()[:3])
  want = plain(*arrays, made.segment_ids(), made.lists(), made.block)
  got = run(call, "reference")
  assert_close({key: got[key] for key in want}, want, 1e-6)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_every_block_is_dense_attention(name, case, run, assert_close):
  arrays = case(**BASE).arrays()
  lists_BTKI = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 70, 2, 6))
  got = run(BASE, name, arrays, lists_BTKI)
  with jax.enable_x64(True):
    wide = [np.float64(array) for array in arrays[:3]]
    o_BTNU, lse_BTN = attention(*wide, return_lse=True, implementation="reference")
  assert_close({key: got[key] for key in ("o", "lse")}, {"o": o_BTNU, "lse": lse_BTN}, 1e-5)


def test_order_of_a_list_changes_nothing_and_every_run_gives_the_same_bits(case, run):
  made = case(**BASE)
  rng = np.random.default_rng(0)
  first = run(BASE, "xla")
  shuffled = run(BASE, "xla", lists=rng.permuted(made.lists(), axis=3))
  chex.assert_trees_all_equal(first, shuffled, run(BASE, "xla"))


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_empty_lists_give_zeros(name, run):
  got = run(BASE, name, lists=np.full((2, 70, 2, 3), -1, np.int32))
  assert np.all(np.isneginf(got["lse"]))
  rest = {key: got[key] for key in ("o", "dq", "dk", "dv")}
  chex.assert_trees_all_equal(rest, jax.tree.map(jnp.zeros_like, rest))


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_gradient_of_blocks_that_nobody_selected_is_exactly_zero(name, run):
  lists_BTKI = np.broadcast_to(np.array([0, 2, -1], np.int32), (2, 70, 2, 3))
  got = run(BASE, name, lists=lists_BTKI)
  for key in ("dk", "dv"):
    reached_S = np.any(np.asarray(got[key]) != 0, axis=(0, 2, 3))
    assert np.flatnonzero(reached_S).tolist() == [*range(16), *range(32, 48)], key


@pytest.mark.parametrize("name, queries", [("reference", 70), ("xla", 70), ("xla", 8)])
def test_nan_goes_where_it_belongs_and_nowhere_else(
  name, queries, case, run, assert_nan_only_where_it_belongs
):
  """8 queries gather their keys."""
  arrays, lists_BTKI = case(**BASE).bad(queries)
  got = run(BASE, name, arrays, lists_BTKI)
  assert_nan_only_where_it_belongs(got, BASE, arrays, lists_BTKI)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_logits_of_minus_infinity_and_huge_ones(name, case, run, expected, assert_close):
  """A key of -inf, whose logit is -inf for every query, weighs nothing; so do others beside 1e4."""
  q_BTNH, k_BSKH, v_BSKU, *rest = case(**BASE).arrays()
  q_BTNH[..., 0] = 1
  masked_BSKH = k_BSKH.copy()
  masked_BSKH[:, :16, :, 0] = -np.inf  # a whole block, and single tokens of another
  masked_BSKH[:, 34:40, :, 0] = -np.inf
  lists_BTKI = np.broadcast_to(np.array([0, 2, 3], np.int32), (2, 70, 2, 3))
  got = run(BASE, name, (q_BTNH, masked_BSKH, v_BSKU, *rest), lists_BTKI)
  low_BSKH = np.where(np.isneginf(masked_BSKH), -1e9, masked_BSKH)
  want = expected(BASE, (q_BTNH, low_BSKH, v_BSKU, *rest), lists_BTKI)
  late = np.s_[:, 48:]
  assert_close({"o": got["o"][late]}, {"o": np.asarray(want["o"])[late]}, 1e-5)
  assert np.all(np.isneginf(got["lse"][:, :32])) and np.all(np.asarray(got["o"])[:, :32] == 0)
  k_BSKH[:, 5] *= 1e4
  arrays = (q_BTNH, k_BSKH, v_BSKU, *rest)
  assert_close(run(BASE, name, arrays), expected(BASE, arrays), 1e-5)


def test_few_queries_of_a_cache_give_what_all_of_them_give(case, run):
  """One query of each row at another position, as in decoding; and one that sees nothing."""
  made = case(**BASE)
  q_BTNH, k_BSKH, v_BSKU = made.arrays()[:3]
  want = run(BASE, "xla")
  positions_BT = np.array([[3, 40, -1], [69, 17, 31]], np.int32)
  pick = (np.arange(2)[:, None], positions_BT)
  attend = jax.jit(functools.partial(nsa_selected_attention, block=16))
  lists_BTKI = made.lists()[pick]
  o_BTNU, lse_BTN = attend(q_BTNH[pick], k_BSKH, v_BSKU, lists_BTKI, positions_BT=positions_BT)
  seen = positions_BT >= 0
  chex.assert_trees_all_close(o_BTNU[seen], want["o"][pick][seen], atol=1e-6)
  chex.assert_trees_all_close(lse_BTN[seen], want["lse"][pick][seen], atol=1e-5)
  assert np.all(np.asarray(o_BTNU)[~seen] == 0) and np.all(np.isneginf(lse_BTN[~seen]))


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 2), (2, 4, 0)], ids=["B", "T", "I"])
def test_nothing_to_attend_gives_zeros(name, shape):
  B, T, I = shape
  q, k, v = jnp.ones((B, T, 2, 4)), jnp.ones((B, 4, 2, 4)), jnp.ones((B, 4, 2, 3))
  lists_BTKI = jnp.zeros((B, T, 2, I), jnp.int32)
  o, lse = nsa_selected_attention(q, k, v, lists_BTKI, implementation=name)
  chex.assert_shape([o, lse], [(B, T, 2, 3), (B, T, 2)])
  assert np.all(np.asarray(o) == 0) and np.all(np.isneginf(lse))


@pytest.mark.slow
def test_vmap_is_one_call_after_another(case):
  made = case(T=20)
  lists_BTKI = made.lists()
  q_BTNH, k_BSKH, v_BSKU = made.arrays()[:3]

  def loss(q, k, v, lists):
    return jnp.sum(nsa_selected_attention(q[None], k[None], v[None], lists[None], block=16)[0] ** 2)

  compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  got = jax.vmap(compiled)(q_BTNH, k_BSKH, v_BSKU, lists_BTKI)
  want = [compiled(*arrays) for arrays in zip(q_BTNH, k_BSKH, v_BSKU, lists_BTKI)]
  chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), atol=1e-5)
