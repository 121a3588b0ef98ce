"""What the operations refuse, what they choose, and their memory."""

# B batch, T query positions, N query heads, K key heads, H head width, C compressed blocks,
# I selected blocks of a query
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.sparse_attention import (
  BlockSizes,
  KeysValues,
  block_starts,
  compress_mean,
  nsa_attention,
  nsa_select,
  nsa_selected_attention,
)

q_BTNH, k_BSKH, lists_BTKI = (
  jnp.ones((1, 6, 4, 8)),
  jnp.ones((1, 6, 2, 8)),
  jnp.zeros((1, 6, 2, 3), jnp.int32),
)


def selected(**changes):
  arrays = {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKU": k_BSKH, "indices_BTKI": lists_BTKI}
  return nsa_selected_attention(**arrays | changes)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(block=0), "sizes.length=0: must be an integer of at least 1"),
    (dict(implementation="magic"), "'magic': must be one of None, 'reference', 'xla'"),
    (dict(interpret=True), "interpret=True: needs implementation= one of"),
    (dict(indices_BTKI=jnp.zeros((1, 6, 2, 3))), "indices_BTKI.dtype='float32': must be integer"),
    (dict(indices_BTKI=jnp.zeros((1, 5, 2, 3), jnp.int32)), r"must be \(1, 6, 2, any\)"),
    (dict(q_BTNH=jnp.ones((1, 6, 3, 8))), "its N must be a multiple of the keys' K=2"),
    (dict(v_BSKU=jnp.ones((1, 6, 2, 8), jnp.bfloat16)), "must be that of q_BTNH, float32"),
    (dict(k_BSKH=jnp.ones((1, 6, 2, 7))), r"k_BSKH.shape=.*must be \(1, any, any, 8\)"),
    (dict(segment_ids_BS=jnp.zeros((1, 5), jnp.int32)), r"segment_ids_BS.shape=\(1, 5\)"),
    (dict(positions_BT=jnp.zeros((3, 6), jnp.int32)), "needs 1 or B=1 rows"),
    (dict(scale=float("inf")), "scale=inf: must be a finite number"),
  ],
)
def test_refused(changes, message):
  with pytest.raises(UserError, match=message):
    selected(**changes)


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(length=24), "sizes.length=24: must be a multiple of sizes.stride=16"),
    (dict(block=40), "sizes.block=40: must be a multiple of sizes.stride=16"),
    (dict(length=128), "sizes.length=128: must be at most sizes.block=64"),
    (dict(count=0), "sizes.count=0: must be an integer of at least 1"),
    (dict(window=2.5), "sizes.window=2.5: must be an integer of at least 1"),
  ],
)
def test_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(UserError, match=message):
    nsa_select(q_BTNH, k_BSKH, k_BSKH, sizes=BlockSizes(**sizes))


def test_blocks_of_a_packed_row_are_counted():
  with pytest.raises(UserError, match="S=6 tokens have C=0 compressed blocks"):
    nsa_select(q_BTNH, k_BSKH, k_BSKH, segment_ids_BS=jnp.zeros((1, 6), jnp.int32))


def test_gates_that_do_not_fit():
  pair = KeysValues(k_BSKH, k_BSKH)
  with pytest.raises(UserError, match=r"gates_BTNX.shape=\(1, 6, 4, 2\): must be \(1, 6, 4, 3\)"):
    nsa_attention(q_BTNH, pair, pair, pair, jnp.ones((1, 6, 4, 2)))


def test_a_named_kernel_says_why_it_cannot_run():
  with pytest.raises(UnsupportedError, match="the device is 'cpu', not a TPU; interpret=True"):
    selected(implementation="pallas_tpu")
  with pytest.raises(UnsupportedError, match="block=24 is not a multiple of 16"):
    selected(implementation="pallas_tpu", interpret=True, block=24)
  with pytest.raises(UnsupportedError, match="q_BTNH.dtype=float16"):
    half = {name: jnp.ones((1, 6, 2, 8), jnp.float16) for name in ("q_BTNH", "k_BSKH", "v_BSKU")}
    selected(implementation="pallas_tpu", interpret=True, **half)


def test_nan_of_a_later_token_changes_nothing_before_it():
  T, t, sizes = 130, 70, BlockSizes(length=8, stride=4, block=16, count=4, window=12)
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, T, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
  gates = np.ones((1, T, 4, 3), np.float32)

  @jax.jit
  def attend(k, v):
    starts_BC = block_starts(T, length=8, stride=4)
    compressed = KeysValues(*(compress_mean(x, starts_BC, length=8) for x in (k, v)))
    return nsa_attention(q, compressed, KeysValues(k, v), KeysValues(k, v), gates, sizes=sizes)

  before = attend(k, v)
  for bad_k, bad_v in ((np.nan, 0), (0, np.nan), (np.inf, np.nan)):
    changed_k, changed_v = k.copy(), v.copy()
    changed_k[0, t, 0] += bad_k
    changed_v[0, t, 0] += bad_v
    after = attend(changed_k, changed_v)
    assert np.array_equal(before[:, :t], after[:, :t])
    assert np.array_equal(before[:, :, 2:], after[:, :, 2:])  # the other key head
    assert np.all(np.isnan(after[0, t : t + 12, :2]).any(axis=-1))


def largest_array(jaxpr):
  """Returns the number of entries of the largest array in a jaxpr and those inside of it."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [value.aval.size for value in equation.outvars if hasattr(value.aval, "size")]
    sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
  return max(sizes)


def whole(T, N=16, K=1, H=64):
  """Returns the gradient of native sparse attention of the paper's sizes, and its arguments."""
  sizes = BlockSizes()

  def loss(q, k, v):
    starts_BC = block_starts(T, length=sizes.length, stride=sizes.stride)
    compressed = KeysValues(*(compress_mean(x, starts_BC, length=sizes.length) for x in (k, v)))
    gates = jnp.ones((1, T, N, 3), q.dtype)
    return jnp.sum(nsa_attention(q, compressed, KeysValues(k, v), KeysValues(k, v), gates))

  shapes = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.float32) for heads in (N, K, K)]
  return jax.grad(loss, (0, 1, 2)), shapes


def test_no_array_of_queries_times_keys_is_traced():
  function, shapes = whole(T=65536)
  entries = largest_array(jax.make_jaxpr(function)(*shapes).jaxpr)
  assert entries <= max(2**25, 2 * 65536 * 16 * 64)  # a block of logits, q twice
  assert entries < 65536**2 / 16


@pytest.mark.slow
def test_compiled_memory_is_linear_in_length():
  sizes = []
  for T in (8192, 32768):
    function, shapes = whole(T)
    sizes.append(jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 4.5 * sizes[0]
