"""Rotations against the whole matrix in float64, codes against the reference's, gradients."""

# R rows, W width of the rotated axis
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hadamard import Rotated, dequantize, hadamard, hadamard_quantize
from pallas_kernels.hadamard.codes import FORMATS, QUEST_CLIP
from pallas_kernels.hadamard.matrices import hadamard_matrix

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SCALED = (("int8", "absmax"), ("int4", "absmax"), ("e4m3fn", "absmax"), ("int4", "quest"))


@dataclasses.dataclass(frozen=True)
class Case:
  """A call on random numbers."""

  W: int
  block: int | None = None
  base: int = 1
  dtype: str = "float32"
  R: int = 5
  group: int = 128

  def arrays(self):
    rng = np.random.default_rng()
    x_RW, dy_RW = (jnp.asarray(rng.normal(size=(self.R, self.W)), self.dtype) for _ in range(2))
    return x_RW, dy_RW, jnp.asarray(rng.choice([-1, 1], self.W), jnp.int8)

  def expected(self, x_RW, signs_W):
    """The rotation in float64."""
    n = self.block or self.W
    blocks = (np.float64(x_RW) * np.float64(signs_W)).reshape(self.R, -1, n)
    return (blocks @ (hadamard_matrix(n, self.base) / np.sqrt(n))).reshape(self.R, self.W)

  @functools.cached_property
  def orders(self):
    return dict(block=self.block, base=self.base)


CASES = (
  Case(256),
  Case(384, block=128, dtype="bfloat16"),
  Case(256, block=32),
  Case(128 * 12, base=12, dtype="bfloat16"),
)


@functools.partial(jax.jit, static_argnums=(3, 4))
def everything(x_RW, dy_RW, signs_W, case, implementation):
  """The rotation, codes in four formats, rounded values, and both gradients, of one program."""
  options = dict(case.orders, signs=signs_W, implementation=implementation)
  options |= dict(interpret=True) if implementation == "pallas_tpu" else {}
  quantize = functools.partial(hadamard_quantize, group=case.group, **options)
  y_RW, pull_back = jax.vjp(functools.partial(hadamard, **options), x_RW)
  quest = functools.partial(quantize, dtype="int4", scale="quest", values=True)
  values_RW, pull_back_values = jax.vjp(quest, x_RW)
  codes = {named: quantize(x_RW, dtype=named[0], scale=named[1]) for named in SCALED}
  return y_RW, pull_back(dy_RW)[0], values_RW, pull_back_values(dy_RW)[0], codes


def relative(got, want):
  got, want = np.float64(got), np.float64(want)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def same_codes(got, want):
  """Codes differ at most where the order of sums does, in one of 10^4."""
  different = np.float32(got.codes) != np.float32(want.codes)
  assert different.sum() <= max(1, 1e-4 * different.size)
  chex.assert_trees_all_close(got.scales, want.scales, rtol=1e-6)


def check_case(case, implementation):
  """A value at 1.66e-3 is bfloat16's rounding of the output alone."""
  arrays = case.arrays()
  x_RW, dy_RW, signs_W = arrays
  y_RW, dx_RW, values_RW, dx_values_RW, codes = everything(*arrays, case, implementation)
  reference = everything(*arrays, case, "reference")
  limit = 1e-6 if case.dtype == "float32" else 2.5e-3
  assert relative(y_RW, case.expected(x_RW, signs_W)) < limit
  # the transpose: <y, dy> = <x, dx>, with the signs on the other side
  unsigned = np.ones(case.W)
  assert relative(dx_RW, case.expected(dy_RW, unsigned) * np.float64(signs_W)) < limit
  for named, got in codes.items():
    same_codes(got, reference[4][named])
  quest = codes["int4", "quest"]
  masked = np.where(np.asarray(quest.trust_mask), np.float64(dy_RW), 0.0)
  want = case.expected(jnp.asarray(masked), unsigned) * np.float64(signs_W)
  assert relative(dx_values_RW, want) < limit
  assert relative(values_RW, dequantize(quest)) < limit
  assert 0.98 < np.mean(quest.trust_mask) <= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla(case):
  check_case(case, "xla")


@pytest.mark.parametrize(
  "case", [Case(256), *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_pallas_tpu(case):
  check_case(case, "pallas_tpu")


@pytest.mark.parametrize("base, n", [(1, 1), (1, 2), (1, 8192), (12, 24), (20, 40), (28, 14336)])
def test_it_is_its_own_inverse_and_keeps_the_norm(base, n):
  x_RW = jnp.asarray(np.random.default_rng().normal(size=(2, n)), jnp.float32)
  rotate = jax.jit(functools.partial(hadamard, base=base, implementation="xla"))
  y_RW = rotate(x_RW)
  assert relative(jnp.sum(y_RW**2), jnp.sum(x_RW**2)) < 1e-5
  assert relative(rotate(y_RW), x_RW) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_one_element_gives_a_row_of_the_matrix_and_a_constant_one_element(implementation):
  rotate = jax.jit(functools.partial(hadamard, base=40, implementation=implementation))
  row = rotate(jnp.zeros((1, 640)).at[0, 7].set(4.0))
  np.testing.assert_allclose(row[0], 4 / np.sqrt(640) * hadamard_matrix(640, 40)[7], rtol=1e-6)
  constant = jax.jit(functools.partial(hadamard, implementation=implementation))(
    jnp.full((1, 256), 3.0)
  )
  np.testing.assert_array_equal(constant, 48.0 * (np.arange(256) == 0)[None])


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    x_RW = jnp.asarray(np.random.default_rng().normal(size=(3, 24)))
    want = np.asarray(x_RW) @ (hadamard_matrix(24, 12) / np.sqrt(24))
    for implementation in ("reference", "xla"):
      got = jax.jit(functools.partial(hadamard, base=12, implementation=implementation))(x_RW)
      assert got.dtype == jnp.float64 and relative(got, want) < 1e-14


def test_formats_and_stochastic_rounding():
  """Each code times its scale is a neighbour of y, and the mean over keys is y itself."""
  y_RW = np.random.default_rng().normal(size=(2, 64)).astype(np.float32)
  x_RW = jax.jit(functools.partial(hadamard, implementation="reference"))(y_RW)

  @jax.jit
  def drawn(keys):
    def draw(key, dtype):
      options = dict(group=32, dtype=dtype, rounding="stochastic", key=key)
      return hadamard_quantize(x_RW, **options, values=True, implementation="xla")

    each = jax.vmap(draw, in_axes=(0, None))
    return {dtype: each(keys, dtype) for dtype in FORMATS}

  @jax.jit
  def rounded(x_RW):
    quantize = functools.partial(hadamard_quantize, x_RW, group=32, implementation="xla")
    return {dtype: quantize(dtype=dtype) for dtype in FORMATS}

  nearest = rounded(x_RW)
  steps = dict(int8=1 / 127, int4=1 / 7, e4m3fn=1 / 8, e5m2=1 / 4, mxfp4=1 / 2)
  for dtype, values in drawn(jax.random.split(jax.random.key(0), 400)).items():
    error = np.asarray(values) - np.asarray(y_RW)
    step = steps[dtype] * np.abs(y_RW).max() * (1 + 1e-5)
    assert np.abs(error).max() <= 2 * step and np.abs(error.mean(0)).max() < 0.3 * step
    codes = nearest[dtype]
    assert codes.codes.dtype == FORMATS[dtype].dtype
    assert np.abs(np.asarray(dequantize(codes)) - np.asarray(y_RW)).max() <= step
    if dtype == "mxfp4":
      assert np.all(np.frexp(np.asarray(codes.scales))[0] == 0.5)


def test_outliers_zeros_and_nan():
  """Zeros keep scale 1; an outlier of 1e4 spreads over its block; NaN stays in its block."""
  x_RW = jnp.asarray(np.random.default_rng().normal(size=(3, 256)), jnp.float32)
  x_RW = x_RW.at[0, :128].set(0).at[1, 5].set(1e4).at[2, 200].set(jnp.nan)

  @functools.partial(jax.jit, static_argnums=1)
  def run(x_RW, implementation):
    options = dict(implementation=implementation, interpret=implementation == "pallas_tpu")
    quantize = functools.partial(hadamard_quantize, x_RW, group=128, dtype="int8", block=64)
    codes = [quantize(scale=scale, **options) for scale in ("absmax", "quest")]
    return hadamard(x_RW, block=64, **options), *codes

  for implementation in ("reference", "xla", "pallas_tpu"):
    y_RW, *rotated = run(x_RW, implementation)
    assert np.isnan(y_RW[2, 192:]).all() and np.isfinite(y_RW[2, :192]).all()
    assert rotated[0].scales[0, 0] == 1 and not np.any(rotated[0].codes[0, :128])
    for codes in rotated:
      values = np.asarray(dequantize(codes))
      assert relative(values[1], y_RW[1]) < 0.03  # half of the group is small
      assert np.isfinite(values[:2]).all() and np.isfinite(values[2, :128]).all()
      assert np.isnan(values[2, 128:]).all()  # a scale for the NaN's block and its neighbour


def test_rotation_lowers_the_error_of_outlier_channels():
  """Int4 with one scale a token, 8 of 1024 channels 50 times as large."""
  rng = np.random.default_rng(0)
  x_RW = np.float32(rng.normal(size=(64, 1024)) * np.where(np.arange(1024) % 128 == 3, 50, 1))
  scales = np.abs(x_RW).max(-1, keepdims=True) / 7
  plain = relative(np.rint(x_RW / scales) * scales, x_RW)

  @jax.jit
  def both(x_RW):
    codes = hadamard_quantize(x_RW, group=1024, dtype="int4", implementation="xla")
    return dequantize(codes), hadamard(x_RW, implementation="xla")

  rotated = relative(*both(x_RW))
  assert 0.09 < rotated < 0.16 and plain > 2 * rotated


@pytest.mark.parametrize("bits", QUEST_CLIP)
def test_the_clip_of_quest_is_optimal_for_a_normal_distribution(bits):
  x = np.linspace(-9, 9, 400_001)
  density = np.exp(-(x**2) / 2)

  def error(clip):
    step = 2 * clip / (2**bits - 1)
    value = (np.round(np.clip(x, -clip, clip) / step + 0.5) - 0.5) * step
    return np.sum(density * (value - x) ** 2)

  assert error(QUEST_CLIP[bits]) < min(error(QUEST_CLIP[bits] * f) for f in (0.99, 1.01))


def test_rows_on_a_mesh_and_leading_axes():
  mesh = jax.make_mesh((4, 2), ("data", "length"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  x = jnp.asarray(np.random.default_rng().normal(size=(4, 2, 64)), jnp.float32)
  run = functools.partial(hadamard_quantize, group=32, dtype="int8", implementation="xla")
  want = jax.jit(run)(x)
  chex.assert_shape(want.scales, (4, 2, 2))
  with jax.set_mesh(mesh):
    spread = jax.reshard(x, jax.P("data", "length"))
    got = jax.jit(run)(spread)
    assert jax.typeof(got.codes).sharding.spec == jax.P("data", "length", None)
    with pytest.raises(NotImplementedError, match="last axis is spread"):
      hadamard(jax.reshard(x, jax.P(None, None, "data")))
  same_codes(jax.device_get(got), jax.device_get(want))


def test_empty_and_vmap():
  assert hadamard(jnp.zeros((0, 8))).shape == (0, 8)
  x = np.random.default_rng().normal(size=(2, 3, 16)).astype(np.float32)
  quantize = functools.partial(hadamard_quantize, group=16, dtype="int8")
  got = jax.jit(jax.vmap(quantize))(x)
  assert isinstance(got, Rotated)
  same_codes(got, jax.jit(quantize)(x))
