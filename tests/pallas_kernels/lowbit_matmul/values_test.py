"""Products with packed weights against the dequantised weights in float64; packing; refusals."""

# M rows, K inner, N outer size of a matrix, G groups of K
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lowbit_matmul import lowbit_matmul, pack, unpack
from pallas_kernels.lowbit_matmul.packing import FORMATS

jitted_pack = jax.jit(pack, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Case:
  """A product with random codes, all of the format."""

  dtype: str
  K: int = 256
  N: int = 128
  group: int | None = 128
  zeros: bool = True
  x: str = "float32"
  M: int = 3

  def codes(self, rng):
    form = FORMATS[self.dtype]
    codes_KN = rng.integers(form.smallest, form.largest + 1, (self.K, self.N))
    return np.where(codes_KN > 0, 1, -1) if self.dtype == "binary" else codes_KN

  def problem(self):
    rng = np.random.default_rng()
    codes_KN = self.codes(rng).astype(np.int8)
    group = self.group or self.K
    G = -(-self.K // group)
    scales_GN, zeros_GN = rng.normal(size=(2, G, self.N)).astype(np.float32)
    form = FORMATS[self.dtype]
    if self.N > 1:
      zeros_GN[0, :2] = form.smallest, form.largest
      scales_GN[:, -1] = 0
    zeros_GN = zeros_GN if self.zeros else None
    spread = functools.partial(np.repeat, repeats=group, axis=0)
    zeros_KN = 0 if zeros_GN is None else spread(zeros_GN)[: self.K]
    w_KN = spread(np.float64(scales_GN))[: self.K] * (codes_KN - np.float64(zeros_KN))
    x_MK, dy_MN = rng.normal(size=(self.M, self.K)), rng.normal(size=(self.M, self.N))
    arrays = (jnp.asarray(x_MK, self.x), jitted_pack(codes_KN, self.dtype), scales_GN)
    return arrays, zeros_GN, jnp.asarray(dy_MN, jnp.float32), w_KN


CASES = (
  Case("int4", K=300, N=130),  # neither whole groups, nor bytes of the last word
  Case("int4", group=32, N=5, x="bfloat16"),
  Case("int4", group=None, N=1, M=1, zeros=False),
  Case("int8", group=64),
  Case("int2", group=None, x="bfloat16"),
  Case("ternary", K=384, zeros=False),
  Case("int3", K=300, N=130),
  Case("int3", K=520, group=None, zeros=False),
  Case("trits", K=700, N=5),
  Case("trits", K=333, group=None, x="bfloat16", zeros=False),
  Case("binary", K=512),
)


@functools.partial(jax.jit, static_argnums=(5, 6))
def run(x_MK, packed, scales_GN, zeros_GN, dy_MN, case, implementation):
  options = dict(dtype=case.dtype, group=case.group, implementation=implementation)
  options |= dict(interpret=True) if implementation == "pallas_tpu" else {}

  def multiply(x_MK):
    return lowbit_matmul(
      x_MK, packed, scales_GN, zeros_GN=zeros_GN, out_dtype=jnp.float32, **options
    )

  y_MN, pull_back = jax.vjp(multiply, x_MK)
  return y_MN, pull_back(dy_MN)[0]


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(codes_KN, dtype):
  packed = pack(codes_KN, dtype)
  return packed, unpack(packed, dtype, codes_KN.shape[0])


def relative(got, want):
  got, want = np.float64(got), np.float64(want)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def check_case(case, implementation):
  arrays, zeros_GN, dy_MN, w_KN = case.problem()
  y_MN, dx_MK = run(*arrays, zeros_GN, dy_MN, case, implementation)
  if case.N > 1:
    assert not np.any(y_MN[:, -1])  # its scale is 0
  x_MK = np.float64(arrays[0])
  size = np.linalg.norm(np.abs(x_MK) @ np.abs(w_KN))  # of a sum whose terms do not cancel
  assert np.linalg.norm(np.float64(y_MN) - x_MK @ w_KN) < 4e-7 * size
  limit = 2e-6 if case.x == "float32" else 2.5e-3  # rounded to bfloat16
  assert relative(dx_MK, np.float64(dy_MN) @ w_KN.T) < limit
  assert dx_MK.dtype == arrays[0].dtype


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_jax(case, implementation):
  check_case(case, implementation)


@pytest.mark.parametrize(
  "case", [Case("int4", K=100, group=96, N=5), Case("trits", K=700, group=300, N=5)], ids=str
)
def test_groups_that_end_within_a_byte_or_beyond_the_last_row(case):
  check_case(case, "xla")


QUICK = (CASES[0], CASES[1])


@pytest.mark.parametrize(
  "case",
  [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
  ids=str,
)
def test_pallas_tpu(case):
  check_case(case, "pallas_tpu")


def test_packed_weights_may_be_constants_of_a_jit():
  """XLA's folding of constants gives wrong numbers on CPU (jax 0.10.2)."""
  rng = np.random.default_rng()
  codes_KN = jnp.asarray(rng.integers(-8, 8, (256, 128)), jnp.int8)
  packed, scales_GN = pack(codes_KN, "int4"), jnp.ones((2, 128))
  x_MK = jnp.asarray(rng.normal(size=(16, 256)), jnp.float32)
  options = dict(dtype="int4", group=128, implementation="pallas_tpu", interpret=True)
  y_MN = jax.jit(lambda x_MK: lowbit_matmul(x_MK, packed, scales_GN, **options))(x_MK)
  assert relative(y_MN, np.float64(x_MK) @ np.float64(codes_KN)) < 1e-5


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("K", [1, 8, 13, 17])
def test_packing_is_exact(dtype, K):
  codes_KN = Case(dtype, K=K, N=3).codes(np.random.default_rng()).astype(np.int8)
  packed, unpacked_KN = there_and_back(codes_KN, dtype)
  bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "ternary": 2, "trits": 1.6, "binary": 1}
  assert packed.nbytes == np.ceil(K * bits[dtype] / 8) * 3
  np.testing.assert_array_equal(unpacked_KN, codes_KN)


def test_even_k_has_the_low_bits():
  codes = jnp.asarray([[1], [-2], [-8]], jnp.int8)
  np.testing.assert_array_equal(pack(codes, "int4"), [[0x1 | 0xE << 4], [0x8]])
  for dtype, codes, bytes_KN in (
    ("ternary", [1, -1, 0], [[0b001101]]),
    ("binary", [1, -1, 1], [[0b101]]),
    ("trits", [1, -1, 0], [[2 + 9 + 27 + 81]]),
    ("int3", [1, -1, 2, -4], [[0b10111001], [0b1000]]),
  ):
    np.testing.assert_array_equal(jitted_pack(np.array([codes]).T, dtype), bytes_KN)


@pytest.mark.parametrize(
  ("dtype", "levels", "published"),
  [("int8", 127, 6.5e-3), ("int4", 7, 0.117), ("int3", 3, 0.274), ("int2", 1, 0.77)],
)
def test_error_of_absmax_on_normal_weights(dtype, levels, published):
  w_KN = np.random.default_rng().normal(size=(1024, 256)).astype(np.float32)
  scales_GN = np.abs(w_KN.reshape(8, 128, 256)).max(1) / levels
  codes = np.rint(w_KN / np.repeat(scales_GN, 128, axis=0)).astype(np.int8)
  arrays = (np.eye(1024, dtype=np.float32), jitted_pack(codes, dtype), scales_GN)
  multiply = functools.partial(lowbit_matmul, dtype=dtype, group=128, implementation="reference")
  got = jax.jit(multiply)(*arrays)
  assert relative(got, w_KN) == pytest.approx(published, rel=0.1)


def test_leading_axes_on_a_mesh():
  case = Case("int4", K=64, N=16, group=32, M=8)
  (x_MK, packed, scales_GN), zeros_GN, dy_MN, w_KN = case.problem()
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  multiply = functools.partial(lowbit_matmul, dtype="int4", group=32, implementation="xla")

  def loss(x, packed, scales_GN, zeros_GN, dy):
    return jnp.sum(multiply(x, packed, scales_GN, zeros_GN=zeros_GN) * dy)

  with jax.set_mesh(mesh):
    specs = jax.P("data", None, None), *(jax.P(None, "tensor"),) * 3, jax.P("data", None, "tensor")
    arrays = (x_MK.reshape(4, 2, -1), packed, scales_GN, zeros_GN, dy_MN.reshape(4, 2, -1))
    spread = [jax.reshard(jnp.asarray(a), spec) for a, spec in zip(arrays, specs)]
    got = jax.jit(jax.grad(loss))(*spread)
    with pytest.raises(NotImplementedError, match="its K is spread over"):
      multiply(jax.reshard(x_MK, jax.P(None, "data")), packed, scales_GN)
  assert relative(got.reshape(8, -1), np.float64(dy_MN) @ w_KN.T) < 1e-5


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype="int5"), "dtype='int5': must be one of"),
    (dict(x=jnp.ones((2, 8), jnp.int32)), "x.dtype='int32': must be floating"),
    (dict(x=jnp.ones((2, 10))), r"packed.shape=\(4, 3\): must be \(5, any\)"),
    (dict(packed=jnp.ones((4, 3), jnp.int8)), "packed.dtype='int8': must be uint8"),
    (dict(scales_GN=jnp.ones((1, 3))), r"scales_GN.shape=\(1, 3\): must be \(2, 3\)"),
    (dict(zeros_GN=jnp.ones((1, 3))), r"zeros_GN.shape=\(1, 3\): must be \(2, 3\)"),
    (dict(group=-1), "group=-1: must be a positive integer"),
    (dict(interpret=True), "interpret=True: needs implementation= one of"),
    (dict(implementation="pallas_tpu"), "not a TPU"),
    (
      dict(implementation="pallas_tpu", interpret=True, group=3, scales_GN=jnp.ones((3, 3))),
      "group=3, the kernel takes divisors and multiples of 128",
    ),
  ],
)
def test_mistakes(change, message):
  good = dict(
    x=jnp.ones((2, 8)),
    packed=jnp.ones((4, 3), jnp.uint8),
    scales_GN=jnp.ones((2, 3)),
    dtype="int4",
    group=4,
  )
  with pytest.raises(ValueError, match=message):
    lowbit_matmul(**(good | change))


def test_codes_out_of_range():
  for dtype, code in (("int4", 8), ("int3", 4), ("int2", 2), ("trits", -2), ("binary", 0)):
    with pytest.raises(ValueError, match=rf"codes_KN=\[{code}\]: {dtype} codes are"):
      pack(jnp.asarray([[code]]), dtype)


def test_scales_have_no_gradient_and_say_so():
  def loss(x, scales_GN):
    packed = jnp.ones((4, 3), jnp.uint8)
    return jnp.sum(lowbit_matmul(x, packed, scales_GN, dtype="int4", implementation="xla"))

  x, scales_GN = np.ones((2, 8), np.float32), np.ones((1, 3), np.float32)
  assert jax.eval_shape(jax.grad(loss), x, scales_GN).shape == x.shape
  with pytest.raises(NotImplementedError, match="packed weights are not trained"):
    jax.grad(loss, 1)(x, scales_GN)
