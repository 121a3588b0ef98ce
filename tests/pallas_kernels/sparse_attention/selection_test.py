"""Scores and choice of blocks against the definition; the compressed branch; packed rows."""

# B batch, T query positions, S key positions, N query heads, K key heads, H head width,
# C compressed blocks, J blocks, I selected blocks of a query
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import (
  BlockSizes,
  KeysValues,
  block_starts,
  compress_mean,
  nsa_attention,
  nsa_select,
)
from pallas_kernels.sparse_attention.places import Places
from pallas_kernels.sparse_attention.selection import best_blocks, pool

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SIZES = BlockSizes(length=8, stride=4, block=16, count=4, window=12)
B, T, N, K, H, U = 2, 130, 4, 2, 8, 5


@functools.cache
def arrays(T=T):
  rng = np.random.default_rng(T)
  shapes = [(B, T, N, H), *[(B, T, K, H), (B, T, K, U)] * 3, (B, T, N, 3)]
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@functools.partial(jax.jit, static_argnames="sizes")
def compressed(k_BSKH, v_BSKU, sizes=SIZES, segment_ids_BS=None):
  starts_BC = block_starts(
    k_BSKH.shape[1], length=sizes.length, stride=sizes.stride, segment_ids_BS=segment_ids_BS
  )
  return KeysValues(*(compress_mean(x, starts_BC, length=sizes.length) for x in (k_BSKH, v_BSKU)))


@functools.partial(jax.jit, static_argnames=("implementation", "sizes"))
def run(q, kc, vc, ks, vs, kw, vw, gates, segment_ids_BS=None, *, implementation, sizes=SIZES):
  return nsa_attention(
    q,
    compressed(kc, vc, sizes, segment_ids_BS),
    KeysValues(ks, vs),
    KeysValues(kw, vw),
    gates,
    sizes=sizes,
    segment_ids_BS=segment_ids_BS,
    return_indices=True,
    implementation=implementation,
  )


select = jax.jit(nsa_select, static_argnames=("sizes", "implementation"))


def margins(scores_BTKJ, indices_BTKI):
  """Returns by how much the worst of the chosen blocks beats the best of the others."""
  chosen = np.zeros(scores_BTKJ.shape, bool)
  for place in np.ndindex(indices_BTKI.shape[:3]):
    chosen[place][[j for j in indices_BTKI[place] if j >= 0]] = True
  worst = np.where(chosen, scores_BTKJ, np.inf).min(axis=-1)
  return worst - np.where(chosen, -np.inf, scores_BTKJ).max(axis=-1)


def masses(scores_BTKJ, indices_BTKI):
  """Returns the scores of the chosen blocks together, 0 for those that are always chosen."""
  scores_BTKJ = np.where(np.isinf(scores_BTKJ), 0, scores_BTKJ)
  of_chosen = np.take_along_axis(scores_BTKJ, np.maximum(indices_BTKI, 0), axis=3)
  return np.where(indices_BTKI < 0, 0, of_chosen).sum(axis=3)


def definition(q_BTNH, kc_BCKH, sizes):
  """Writes out equations 8 to 10 and the rules of the choice, one query at a time, in float64."""
  q_BTNH, kc_BCKH = np.float64(q_BTNH), np.float64(kc_BCKH)
  J, ratio, overlap = (
    -(-T // sizes.block),
    sizes.block // sizes.stride,
    sizes.length // sizes.stride,
  )
  scores_BTKJ = np.full((B, T, K, J), -np.inf)
  lists = np.full((B, T, K, sizes.count), -1)
  for b, t, k in np.ndindex(B, T, K):
    seen = [i for i in range(kc_BCKH.shape[1]) if i * sizes.stride + sizes.length - 1 <= t]
    p_C = np.zeros(kc_BCKH.shape[1])
    for n in range(k * (N // K), (k + 1) * (N // K)) if seen else ():
      e = np.exp(kc_BCKH[b, seen, k] @ q_BTNH[b, t, n] / np.sqrt(H))
      p_C[seen] += e / e.sum()
    own = t // sizes.block
    for j in range(own + 1):
      shared = [j * ratio + m - r for m in range(ratio) for r in range(overlap)]
      scores_BTKJ[b, t, k, j] = sum(p_C[i] for i in shared if 0 <= i < len(p_C))
      if j in (0, own, own - 1):
        scores_BTKJ[b, t, k, j] = np.inf
    best = sorted(range(own + 1), key=lambda j: (-scores_BTKJ[b, t, k, j], j))[: sizes.count]
    lists[b, t, k, : len(best)] = sorted(best)
  return scores_BTKJ, lists


def test_selection_is_the_definition():
  q_BTNH, k_BSKH, v_BSKU = arrays()[:3]
  kc_BCKH, vc_BCKU = compressed(k_BSKH, v_BSKU)
  scores_BTKJ, lists = definition(q_BTNH, kc_BCKH, SIZES)
  clear_BTK = margins(scores_BTKJ, lists) > 1e-5
  assert clear_BTK.mean() > 0.95
  for name in ("reference", "xla"):
    got = jax.device_get(select(q_BTNH, kc_BCKH, vc_BCKU, sizes=SIZES, implementation=name))
    chex.assert_type(got.indices_BTKI, jnp.int32)
    assert np.array_equal(got.indices_BTKI[clear_BTK], lists[clear_BTK]), name
    mass_BTK, wanted_BTK = (masses(scores_BTKJ, x) for x in (got.indices_BTKI, lists))
    assert np.all(mass_BTK >= wanted_BTK - 1e-5), name
    blind = np.arange(T) < SIZES.length - 1
    blind_BTN = np.broadcast_to(blind[None, :, None], (B, T, N))
    assert np.all(np.asarray(got.o_BTNU)[:, blind] == 0)
    assert np.array_equal(np.isneginf(got.lse_BTN), blind_BTN)


def test_weights_of_the_papers_sizes():
  """A block of 64 shares 1, 2, 2, 2, 1 strides of 16 with the compressed blocks around it."""
  J = 3
  jitted_pool = jax.jit(pool, static_argnums=(1, 2))
  eye = np.eye(11, dtype=np.float32)[None, None]
  weights_CJ = np.asarray(jitted_pool(eye, J * 64, BlockSizes()))[0, 0]
  for j in range(J):
    want = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
    got = {i: weight for i, weight in enumerate(weights_CJ[:, j]) if weight}
    assert got == {i: weight for i, weight in want.items() if 0 <= i < 11}
  plain = BlockSizes(length=16, stride=16, block=16)
  assert np.array_equal(jitted_pool(eye[..., :4, :4], 64, plain), eye[..., :4, :4])


def test_ties_go_to_the_lower_index_and_forced_blocks_count():
  positions_BT = np.array([[5, 40, 128, -1]])
  scores = np.zeros((1, 1, 4, 9), np.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def best(positions_BT, sizes):
    return best_blocks(scores, Places(positions_BT), sizes)

  chosen = np.asarray(best(positions_BT, SIZES))[0, :, 0].tolist()
  assert chosen == [[0, -1, -1, -1], [0, 1, 2, -1], [0, 1, 7, 8], [-1] * 4]
  single = BlockSizes(length=8, stride=4, block=16, count=1)
  assert np.asarray(best(positions_BT, single))[0, 2, 0].tolist() == [0]


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_equal_keys_tie(name):
  q_BTNH, k_BSKH, v_BSKU = arrays()[:3]
  equal = np.broadcast_to(k_BSKH[:, :1], (B, 31, K, H))
  values = np.broadcast_to(v_BSKU[:, :1], (B, 31, K, U))
  got = jax.device_get(select(q_BTNH, equal, values, sizes=SIZES, implementation=name))
  # every compressed block is as likely: blocks inside share most, and the first of these win
  assert np.array_equal(got.indices_BTKI[:, 127], np.tile([0, 1, 6, 7], (B, K, 1)))


def test_gradients_reach_compressed_blocks_only_through_the_output():
  q_BTNH, k_BSKH, v_BSKU = arrays(20)[:3]

  def choice(kc, vc):
    lists = nsa_select(q_BTNH, kc, vc, sizes=SIZES).indices_BTKI
    return jnp.sum(lists.astype(jnp.float32))

  grads = jax.jit(jax.grad(choice, (0, 1)))(*compressed(k_BSKH, v_BSKU))
  assert not any(map(np.any, jax.device_get(jax.tree.leaves(grads))))


@jax.jit
def _with_gradients(*args):
  *inputs, do_BTNU, segment_ids_BS = args
  outs = []
  for name in ("reference", "xla"):
    attend = functools.partial(run, segment_ids_BS=segment_ids_BS, implementation=name)
    o_BTNU, pull, lists = jax.vjp(attend, *inputs, has_aux=True)
    outs.append((o_BTNU, *pull(do_BTNU), lists))
  return outs


def test_whole_attention_with_segments_and_gradients():
  rng = np.random.default_rng(1)
  ids_BS = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
  do_BTNU = rng.normal(size=(B, T, N, U)).astype(np.float32)
  want, got = jax.device_get(_with_gradients(*arrays(), do_BTNU, ids_BS))
  chex.assert_trees_all_equal(got[-1], want[-1])
  for x, y in zip(got[:-1], want[:-1]):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.parametrize("length, count", [(1, 16), (65, 1)])
def test_short_rows_at_the_papers_sizes(length, count):
  """Without a compressed block, and with one selected block."""
  sizes = BlockSizes(count=count)

  @functools.partial(jax.jit, static_argnames="name")
  def both(inputs, do_BTNU, name):
    attend = functools.partial(run, implementation=name, sizes=sizes)
    o_BTNU, pull, lists = jax.vjp(attend, *inputs, has_aux=True)
    return (o_BTNU, *pull(do_BTNU)), lists

  inputs = [array[:, :length] for array in arrays()]
  do_BTNU = np.random.default_rng(1).normal(size=(B, length, N, U)).astype(np.float32)
  (got, chosen), (want, lists) = (both(inputs, do_BTNU, name) for name in ("xla", "reference"))
  chex.assert_trees_all_equal(chosen, lists)
  chex.assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_a_packed_row_gives_what_its_segments_give_alone(name):
  """Segments shorter than a compressed block, and boundaries that no block falls on."""
  lengths = (37, 3, 90)
  ids_BS = np.repeat(np.arange(3, dtype=np.int32), lengths)[None].repeat(B, axis=0)
  packed, lists = run(*arrays(), ids_BS, implementation=name)
  first = 0
  for length in lengths:
    part = [array[:, first : first + length] for array in arrays()]
    alone, lists_alone = run(*part, implementation="reference")
    here = np.s_[:, first : first + length]
    chex.assert_trees_all_close(packed[here], alone, atol=2e-6)
    chex.assert_trees_all_equal(lists[here], lists_alone)
    first += length


def test_a_query_of_a_cache_gives_what_it_gives_among_all():
  """Decoding: one query at a time, over caches that hold more than it may see."""
  q, kc, vc, ks, vs, kw, vw, gates = arrays()
  want, lists = run(*arrays(), implementation="xla")
  step = jax.jit(functools.partial(nsa_attention, sizes=SIZES, return_indices=True))
  blocks = compressed(kc, vc)
  for t in (0, 6, 7, 15, 16, 129):
    positions_BT = np.full((B, 1), t, np.int32)
    at = np.s_[:, t : t + 1]
    got, chosen = step(
      q[at], blocks, KeysValues(ks, vs), KeysValues(kw, vw), gates[at], positions_BT=positions_BT
    )
    chex.assert_trees_all_close(got, want[at], atol=2e-6)
    chex.assert_trees_all_equal(chosen, lists[at])


def test_gates_choose_branches_and_every_block_is_full_attention():
  q, kc, vc, ks, vs, kw, vw, _ = arrays()
  everything = BlockSizes(length=8, stride=4, block=16, count=9, window=12)
  gates = np.zeros((B, T, N, 3), np.float32)
  gates[..., 1] = 1
  got, _ = run(q, kc, vc, ks, vs, kw, vw, gates, implementation="xla", sizes=everything)
  from pallas_kernels.attention import attention

  chex.assert_trees_all_close(got, attention(q, ks, vs, implementation="reference"), atol=2e-6)
  gates[..., 1], gates[..., 2] = 0, 1
  got, _ = run(q, kc, vc, ks, vs, kw, vw, gates, implementation="xla", sizes=everything)
  want = attention(q, kw, vw, window=12, implementation="reference")
  chex.assert_trees_all_close(got, want, atol=2e-6)
