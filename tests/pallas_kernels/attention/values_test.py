"""Values and gradients: blocks against the reference, the reference against the definition."""

# B batch, T query positions, S key positions, N query heads, K key heads
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CASES = {
  "one position": dict(T=1, S=1),
  "odd": dict(T=73, S=73),
  "grouped, wider values": dict(T=130, S=130, N=4, U=12),
  "one key head, narrow window": dict(T=65, S=65, N=3, K=1, window=3),
  "wide window, narrow values": dict(T=130, S=130, window=70, U=3, H=9),
  "packed": dict(T=130, S=130, N=4, packed=True),
  "packed, window, cap": dict(T=97, S=97, N=4, packed=True, window=5, cap=2.0, size=3),
  "large logits": dict(T=70, S=70, size=100),
  "scale": dict(T=20, S=20, scale=-0.7),
  "last queries of more keys": dict(T=70, S=150, N=4, window=90),
  "more queries than keys": dict(T=90, S=20, N=4),
  "any order": dict(T=80, S=80, N=4, shuffled=True, window=30),
  "any order, packed, other keys": dict(T=40, S=90, N=4, shuffled=True, packed=True, cap=5.0),
  "both directions": dict(T=70, S=70, causal=False),
  "both directions, packed, other keys": dict(T=40, S=90, N=4, causal=False, packed=True),
}


# what the quick tests run; the others take the rest of a minute
QUICK = ("grouped, wider values", "packed, window, cap", "more queries than keys")
LOOPED_QUICK = ("packed, window, cap", "any order, packed, other keys")


@pytest.mark.parametrize(
  "looped, case",
  [*((False, case) for case in QUICK), *((True, case) for case in LOOPED_QUICK)],
)
def test_blocks_are_the_reference_with_gradients(looped, case, run, assert_close):
  tolerance = 2e-6 * max(1, CASES[case].get("size", 1))
  got = run(CASES[case], "xla", looped=looped)
  assert_close(got, run(CASES[case], "reference"), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_all_cases(looped, case, run, assert_close):
  test_blocks_are_the_reference_with_gradients(looped, case, run, assert_close)


@pytest.mark.parametrize("case", ["packed, window, cap", "any order, packed, other keys"])
def test_float64_agrees_to_its_own_precision(case, run, arrays_of, assert_close):
  with jax.enable_x64(True):
    arrays = arrays_of(CASES[case], np.float64)
    got, want = (run(CASES[case], name, arrays) for name in ("xla", "reference"))
    chex.assert_type(jax.tree.leaves(got), np.float64)
    assert_close(got, want, 1e-13)
    wide = arrays_of(CASES[case])
    assert_close(run(CASES[case], "reference", wide), want, 1e-5)


@pytest.mark.parametrize("name, output, gradient", [("xla", 4e-3, 6e-3), ("reference", 2e-3, 2e-3)])
def test_bfloat16_is_near_the_same_numbers_in_float32(name, output, gradient, run, arrays_of):
  case = dict(T=130, S=130, N=4, H=64, U=64, window=100)
  narrow = arrays_of(case, jnp.bfloat16)
  wide = tuple(jnp.asarray(array, jnp.float32) for array in narrow)
  got, want = run(case, name, narrow), run(case, "reference", wide)
  chex.assert_type([got[key] for key in ("o", "dq", "dk", "dv")], jnp.bfloat16)
  chex.assert_type(got["lse"], jnp.float32)
  for key in want:
    difference = np.linalg.norm(np.asarray(got[key], np.float32) - want[key])
    error = difference / np.linalg.norm(want[key])
    assert error <= (output if key in ("o", "lse") else gradient), (key, error)


def plain(q_BTNH, k_BTNH, v_BTNU, ids_BT, window, cap):
  """Writes out the definition in numpy, one query and head at a time."""
  o_BTNU, lse_BTN = np.zeros((*q_BTNH.shape[:3], v_BTNU.shape[3])), np.zeros(q_BTNH.shape[:3])
  for b, t, n in np.ndindex(*lse_BTN.shape):
    seen = [s for s in range(max(0, t - window + 1), t + 1) if ids_BT[b, s] == ids_BT[b, t]]
    a_S = cap * np.tanh(k_BTNH[b, seen, n] @ q_BTNH[b, t, n] / np.sqrt(q_BTNH.shape[3]) / cap)
    lse_BTN[b, t, n] = np.log(np.sum(np.exp(a_S)))
    o_BTNU[b, t, n] = np.exp(a_S - lse_BTN[b, t, n]) @ v_BTNU[b, seen, n]
  return {"o": o_BTNU, "lse": lse_BTN}


def test_reference_is_the_definition(run, arrays_of, tokens_of, assert_close):
  case = dict(T=12, S=12, U=5, window=4, cap=2.0, size=3, packed=True)
  got = run(case, "reference")
  arrays = (array.astype(np.float64) for array in arrays_of(case)[:3])
  want = plain(*arrays, tokens_of(case)["q_segment_ids_BT"], case["window"], case["cap"])
  assert_close({key: got[key] for key in want}, want, 1e-6)


def test_a_group_of_heads_attends_to_the_same_keys():
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 9, heads, 4)).astype(np.float32) for heads in (6, 2, 2))
  attend = jax.jit(functools.partial(attention, implementation="reference"))
  grouped = attend(q, k, v)
  whole = attend(q, *(np.repeat(array, 3, axis=2) for array in (k, v)))
  chex.assert_trees_all_close(grouped, whole, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_gradient_to_keys_that_a_query_does_not_see_is_exactly_zero(name, window, run, arrays_of):
  T, t = 80, 66
  case = dict(T=T, S=T, K=1, window=window)
  q_BTNH, k_BTKH, v_BTKU, do_BTNU, dlse_BTN = arrays_of(case)
  do_BTNU[:, np.arange(T) != t] = 0
  dlse_BTN[:, np.arange(T) != t] = 0
  got = run(case, name, (q_BTNH, k_BTKH, v_BTKU, do_BTNU, dlse_BTN))
  first = 0 if window is None else t - window + 1
  for key, rows in (("dk", range(first, t + 1)), ("dv", range(first, t + 1)), ("dq", [t])):
    reached_T = np.any(np.asarray(got[key]) != 0, axis=(0, 2, 3))
    assert np.flatnonzero(reached_T).tolist() == list(rows), key


@pytest.mark.parametrize("name, looped", [("reference", False), ("xla", False), ("xla", True)])
def test_queries_without_a_key_give_zeros_and_no_nan(name, looped, run, arrays_of):
  case = dict(T=90, S=20, N=4)  # queries 0 .. 69 stand before the first key
  *arrays, dlse_BTN = arrays_of(case)
  dlse_BTN[:, :70] = np.nan  # such as the gradient of log-sum-exp of nothing but -inf
  got = run(case, name, (*arrays, dlse_BTN), looped=looped)
  assert np.all(got["o"][:, :70] == 0) and np.all(got["dq"][:, :70] == 0)
  assert np.all(np.isneginf(got["lse"][:, :70])) and np.all(np.isfinite(got["lse"][:, 70:]))
  chex.assert_tree_all_finite([got["o"], got["dq"], got["dk"], got["dv"]])


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_nan_in_a_key_reaches_the_queries_that_see_it_and_no_others(name, run, arrays_of):
  case = dict(T=80, S=80, window=10)
  q_BTNH, k_BTKH, *others = arrays_of(case)
  k_BTKH[0, 40, 1, 2] = np.nan
  got = run(case, name, (q_BTNH, k_BTKH, *others))
  wanted = np.zeros((2, 80, 2), bool)
  wanted[0, 40:50, 1] = True
  assert np.array_equal(np.isnan(got["o"]).any(axis=-1), wanted)
  assert np.array_equal(np.isnan(got["lse"]), wanted)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=["B", "T", "S"])
def test_nothing_to_attend_gives_zeros(name, shape):
  B, T, S = shape
  q, k, v = jnp.ones((B, T, 2, 4)), jnp.ones((B, S, 2, 4)), jnp.ones((B, S, 2, 3))
  o, lse = attention(q, k, v, implementation=name, return_lse=True)
  chex.assert_shape([o, lse], [(B, T, 2, 3), (B, T, 2)])
  assert np.all(np.asarray(o) == 0) and np.all(np.isneginf(lse))


class Variants(chex.TestCase):
  """With and without jit, and under vmap."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_jit_changes_nothing(self):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 20, heads, 4)).astype(np.float32) for heads in (2, 1, 1))
    want = jax.jit(functools.partial(attention, implementation="reference"))(q, k, v)
    chex.assert_trees_all_close(self.variant(attention)(q, k, v), want, atol=1e-6)

  def test_vmap_is_one_call_after_another(self):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, 1, 20, heads, 4)).astype(np.float32) for heads in (2, 1, 1))
    loss = jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(attention(q, k, v) ** 2)))
    got = jax.vmap(loss)(q, k, v)
    want = [loss(*arrays) for arrays in zip(q, k, v)]
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), atol=1e-5)
