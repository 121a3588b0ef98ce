"""Grouped products against one product a group in float64, with gradients, in floats and codes."""

# T rows, K inner, N outer size of a matrix, E groups
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SIZES = {
  "two tiles share a block, one is empty, rows are left": (100, 0, 130, 40),
  "one takes all": (0, 300, 0, 0),
  "nobody": (0, 0, 0, 0),
  "single rows, the last empty": (1, 1, 1, 0),
}
T, K, N = 300, 128, 128
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
BANDS = {None: (0, 1e-6), "e4m3fn": (3.2e-2, 4.2e-2), "int8": (6e-3, 1.5e-2)}


def problem(dtype=jnp.float32, E=4):
  rng = np.random.default_rng()
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, K), (E, K, N), (T, N)))


@functools.partial(jax.jit, static_argnums=(4, 5))
def run(x_TK, w_EKN, dy_TN, sizes_E, dtype, implementation):
  """The product and both gradients."""
  options = dict(dtype=dtype, allow_emulation=True, implementation=implementation)
  options |= dict(interpret=True) if implementation == "pallas_tpu" else {}
  multiply = functools.partial(grouped_matmul, group_sizes_E=sizes_E, **options)
  y_TN, pull_back = jax.vjp(multiply, x_TK, w_EKN)
  return y_TN, *pull_back(dy_TN)


def expected(x_TK, w_EKN, dy_TN, sizes):
  x_TK, w_EKN, dy_TN = (np.float64(array) for array in (x_TK, w_EKN, dy_TN))
  y_TN, dx_TK, dw_EKN = np.zeros((T, N)), np.zeros((T, K)), np.zeros(w_EKN.shape)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    y_TN[rows], dx_TK[rows] = x_TK[rows] @ w_EKN[e], dy_TN[rows] @ w_EKN[e].T
    dw_EKN[e], start = x_TK[rows].T @ dy_TN[rows], start + size
  return y_TN, dx_TK, dw_EKN


def relative(got, want):
  got, want = np.float64(got), np.float64(want)
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def check_sizes(sizes, dtype, implementation):
  arrays = problem()
  got = run(*arrays, jnp.asarray(sizes, jnp.int32), dtype, implementation)
  low, high = BANDS[dtype] if sum(sizes) > 10 else (0, 0.2 if dtype else 1e-6)
  for ours, want in zip(got, expected(*arrays, sizes)):
    assert low <= relative(ours, want) <= high or not np.any(want)
  past = sum(sizes)
  assert not np.any(got[0][past:]) and not np.any(got[1][past:])
  for e, size in enumerate(sizes):
    assert size > 0 or not np.any(got[2][e])
  return arrays, got


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", BANDS)
def test_reference_and_xla(sizes, dtype):
  arrays, got = check_sizes(sizes, dtype, "xla")
  want = run(*arrays, jnp.asarray(sizes, jnp.int32), dtype, "reference")
  for ours, theirs in zip(got, want):
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [slow(None), "e4m3fn", slow("int8")])
def test_pallas_tpu(dtype):
  """One program for all sizes."""
  for sizes in SIZES.values():
    arrays, got = check_sizes(sizes, dtype, "pallas_tpu")
    want = run(*arrays, jnp.asarray(sizes, jnp.int32), dtype, "reference")
    for ours, theirs in zip(got, want):
      assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [None, "e4m3fn"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_nan_stays_in_its_row_and_its_group(dtype, implementation):
  x_TK, w_EKN, dy_TN = problem()
  sizes_E = jnp.asarray((100, 0, 130, 40), jnp.int32)
  got = run(x_TK.at[120, 3].set(jnp.nan), w_EKN, dy_TN, sizes_E, dtype, implementation)
  assert np.isnan(got[0][120]).all() and np.isfinite(np.delete(got[0], 120, 0)).all()
  assert np.isfinite(got[1]).all()
  assert np.isnan(got[2][2, 3]).all() and np.isfinite(np.delete(got[2], 2, 0)).all()
  got = run(x_TK, w_EKN.at[0, 3, 5].set(jnp.nan), dy_TN, sizes_E, dtype, implementation)
  assert np.isnan(got[0][:100, 5]).all() and np.isfinite(got[0][100:]).all()


def test_permuting_groups_and_many_empty_ones():
  """256 groups, 3 of them with rows."""
  rng = np.random.default_rng()
  x_TK = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
  w_EKN = jnp.asarray(rng.normal(size=(256, 8, 4)), jnp.float32)
  sizes = np.zeros(256, np.int32)
  sizes[[3, 77, 255]] = 5, 8, 7
  multiply = jax.jit(functools.partial(grouped_matmul, implementation="xla"))
  y_TN = multiply(x_TK, w_EKN, jnp.asarray(sizes))
  want = np.einsum("tk,tkn->tn", x_TK, np.asarray(w_EKN)[np.repeat(np.arange(256), sizes)])
  np.testing.assert_allclose(y_TN, want, rtol=1e-5, atol=1e-5)
  backwards = np.concatenate([x_TK[13:], x_TK[5:13], x_TK[:5]])
  again = multiply(jnp.asarray(backwards), w_EKN[::-1], jnp.asarray(sizes[::-1].copy()))
  np.testing.assert_array_equal(again, np.concatenate([y_TN[13:], y_TN[5:13], y_TN[:5]]))


def test_bfloat16_float64_and_empty():
  arrays = problem(jnp.bfloat16)
  sizes = (100, 0, 130, 40)
  got = run(*arrays, jnp.asarray(sizes, jnp.int32), None, "xla")
  for ours, want in zip(got, expected(*arrays, sizes)):
    assert ours.dtype == jnp.bfloat16 and relative(ours, want) < 2.5e-3
  with jax.enable_x64(True):
    arrays = problem(jnp.float64)
    got = run(*arrays, jnp.asarray(sizes, jnp.int32), None, "xla")
    for ours, want in zip(got, expected(*arrays, sizes)):
      assert relative(ours, want) < 1e-14
  empty = grouped_matmul(jnp.zeros((0, 4)), jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32))
  assert empty.shape == (0, 3)


def test_sizes_that_are_wrong_under_jit_have_a_defined_result():
  """A negative size counts as 0; rows past T do not exist."""
  x_TK, w_EKN, _ = problem()
  multiply = jax.jit(functools.partial(grouped_matmul, implementation="xla"))
  got = multiply(x_TK, w_EKN, jnp.asarray([-5, 200, 500, 7], jnp.int32))
  want = multiply(x_TK, w_EKN, jnp.asarray([0, 200, 100, 0], jnp.int32))
  np.testing.assert_array_equal(got, want)


def test_memory_of_the_gradients_does_not_grow_with_the_groups():
  """`jax.lax.ragged_dot` holds E copies of the rows on CPU, here 64 times 1 MiB."""
  shapes = ((2048, 256), (64, 256, 256), (2048, 256))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  sizes_E = jax.ShapeDtypeStruct((64,), jnp.int32)
  compiled = run.lower(*arrays, sizes_E, None, "xla").compile()
  padded_rows, float32_gradient = (2048 + 64 * 128) * 256 * 4, 64 * 256 * 256 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * padded_rows + 2 * float32_gradient


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(x_TK=jnp.ones(3)), r"x_TK.shape=\(3,\)"),
    (dict(w_EKN=jnp.ones((2, 5, 3))), r"w_EKN.shape=\(2, 5, 3\): must be \(any, 4, any\)"),
    (dict(w_EKN=jnp.ones((2, 4, 3), jnp.bfloat16)), "w_EKN.dtype='bfloat16': must be float32"),
    (dict(group_sizes_E=jnp.ones(3, jnp.int32)), r"must be \(2,\)"),
    (dict(group_sizes_E=jnp.ones(2)), "group_sizes_E.dtype='float32': must be integer"),
    (dict(group_sizes_E=jnp.array([-1, 2])), r"group_sizes_E=\[-1, 2\]: must not be negative"),
    (dict(group_sizes_E=jnp.array([4, 3])), "must add up to at most the 6 rows"),
    (dict(dtype="fp4"), "dtype='fp4': must be one of"),
    (dict(bwd_dtype="e5m2"), "bwd_dtype='e5m2': goes with dtype="),
    (dict(dtype="int8", bwd_dtype="e5m2", allow_emulation=True), "goes only with itself"),
    (dict(block=0), "block=0"),
    (dict(interpret=True), "interpret=True: needs implementation= one of"),
    (dict(implementation="ragged"), "implementation='ragged': must be one of"),
    (dict(implementation="pallas_tpu"), "not a TPU"),
    (dict(dtype="e4m3fn"), "does not multiply these codes natively"),
    (
      dict(implementation="pallas_tpu", interpret=True, dtype="int8"),
      "codes need multiples of 128",
    ),
  ],
)
def test_mistakes(change, message):
  good = dict(
    x_TK=jnp.ones((6, 4)), w_EKN=jnp.ones((2, 4, 3)), group_sizes_E=jnp.ones(2, jnp.int32)
  )
  with pytest.raises(ValueError, match=message):
    grouped_matmul(**(good | change))
